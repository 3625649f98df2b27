// What decode_step records about itself for `lab ledger --inside`: of every block and phase when it ended, how
// long the block waited for other blocks and for tiles of weights, and how many tiles lay ready or were under
// way when it could begin to multiply.
//
// On a CPU the kernel always can record, and does if it is given memory to record in. On a GPU a kernel that
// can is another kernel, compiled from cuda_src/traced/decode_step.cu on demand: in the one that everybody runs
// all functions below are empty.
//
//   trace [blocks, 5 * layers + 4, 4] int64, zero where nothing was recorded
//     row 0         the clock and the global time when the block began, and the two when it ended
//     other rows    a phase each: the clock when it ended; how much of it the block waited for other blocks;
//                   how much for tiles; tiles issued and not yet multiplied when its row had arrived, or -1
//
// The phases are: the start (up to the block's share of the embedding); qkv, attention, o, gate and up, and
// down of each layer; lm_head; the end (the choice of the token). A phase begins where the one before ended.
//
// Times are of the multiprocessor's clock, because the global timer, which all multiprocessors share, ticks too
// rarely: on some GPUs once a microsecond. The two pairs of row 0, each taken at a tick, convert one to the
// other.
#pragma once
#include <type_traits>

#include "../common.cuh"

#ifndef LAB_STEP_TRACE
#define LAB_STEP_TRACE 0
#endif

namespace lab {

constexpr bool kStepTrace = kHost || LAB_STEP_TRACE;
constexpr int kTraceBlocks = 1024;  // TRACE_BLOCKS of the contract
constexpr int kTraceColumns = 4;

// Nanoseconds, the same on all multiprocessors.
LAB_DEVICE int64_t global_time() {
#ifdef __CUDACC__
  int64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
  return now;
#else
  return clock64();
#endif
}

// A block's, in shared memory. Of the threads that multiply only thread 0 records; what it waits for at a
// barrier the others have waited for as well.
struct BlockTrace {
  struct Argument { int64_t* trace; };  // null: nothing is recorded

  int64_t* row;                  // the next one; null: nothing is recorded
  int64_t* pairs;                // row 0
  int64_t since, others, tiles;  // when the present wait began; sums of the present phase
  int ahead;                     // tiles when the present phase's row had arrived; -1: it has not
  unsigned issued, used;         // tiles since the start

  // Called by thread 0, before a barrier of the block.
  LAB_DEVICE void start(const Argument& a, int layers) {
    issued = used = 0;
    row = nullptr;
    if (!a.trace) return;
    pairs = a.trace + int64_t(blockIdx.x) * (5 * layers + 4) * kTraceColumns;
    row = pairs + kTraceColumns;
    write_pair(0);
    begin_phase(pairs[0]);
  }
  // Called by all threads that multiply. waits(): what follows is a wait for other blocks; so is the beginning of
  // a phase. arrived(): after a barrier, the wait is over.
  LAB_DEVICE void waits() {
    if (on()) since = clock64();
  }
  LAB_DEVICE void arrived() {
    if (!on()) return;
    others += clock64() - since;
    if (ahead < 0) ahead = int(atomicAdd(&issued, 0u) - used);
  }
  LAB_DEVICE void end_phase() {
    if (!on()) return;
    const int64_t now = clock64();
    row[0] = now, row[1] = others, row[2] = tiles, row[3] = ahead;
    row += kTraceColumns;
    begin_phase(now);
  }
  // Called by thread 0, at the block's end.
  LAB_DEVICE void finish() {
    if (!row) return;
    end_phase();
    write_pair(2);
  }
  // now() and tile_arrived(): around the wait for a tile. tile_used(): the tile is free again.
  LAB_DEVICE int64_t now() const { return on() ? clock64() : 0; }
  LAB_DEVICE void tile_arrived(int64_t began) {
    if (on()) tiles += clock64() - began;
  }
  LAB_DEVICE void tile_used() {
    if (on()) ++used;
  }
  // Called by the thread that issues copies.
  LAB_DEVICE void tile_issued() {
    if (row) atomicAdd(&issued, 1u);
  }

 private:
  LAB_DEVICE bool on() const { return threadIdx.x == 0 && row; }
  LAB_DEVICE void begin_phase(int64_t now) { since = now, others = tiles = 0, ahead = -1; }
  LAB_DEVICE void write_pair(int at) {
    const int64_t before = global_time();
    int64_t tick = before;
    while (tick == before) tick = global_time();
    pairs[at] = clock64(), pairs[at + 1] = tick;
  }
};

// The same of a kernel that cannot record.
struct NoTrace {
  struct Argument {};
  LAB_DEVICE void start(const Argument&, int) {}
  LAB_DEVICE void waits() {}
  LAB_DEVICE void arrived() {}
  LAB_DEVICE void end_phase() {}
  LAB_DEVICE void finish() {}
  LAB_DEVICE int now() const { return 0; }
  LAB_DEVICE void tile_arrived(int) {}
  LAB_DEVICE void tile_used() {}
  LAB_DEVICE void tile_issued() {}
};

using StepTrace = std::conditional_t<kStepTrace, BlockTrace, NoTrace>;

}  // namespace lab
