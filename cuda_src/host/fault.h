// Turns an invalid access in a kernel (past shared memory, a wild address, a stack overflow, an integer
// division by zero) into an error of the launch; the process goes on. Faults outside kernels get the handlers
// they had before.
#pragma once

namespace lab {
namespace host {

void catch_faults_on_this_thread();

}  // namespace host
}  // namespace lab
