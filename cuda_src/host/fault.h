// A bad access in a kernel (past shared memory, a wild address, a stack overflow, an integer division by zero) becomes
// an error of the launch and not the end of the process. Faults outside kernels go where they went before.
#pragma once

namespace lab {
namespace host {

void catch_faults_on_this_thread();

}  // namespace host
}  // namespace lab
