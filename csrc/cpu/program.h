// Blocks, dense blocks and heads that lead from one image to one output, prepared once and run again and again.
#pragma once
#include <array>
#include <memory>
#include <mutex>
#include <vector>

#include "block.h"

namespace resnet_fused::cpu {

struct Step {
  static constexpr int kInput = -1;

  Block block;                        // or the x and the output of one of those below
  int64_t c = 0;                      // channels of x
  std::array<int64_t, 4> out{};       // NCHW
  int x = kInput, residual = kInput;  // the step whose output that is; kInput: the program's x
  DenseShape dense{};
  std::vector<Block> layers{};  // of a dense block
  Head head{};                  // one with weights is a head

  int64_t out_bytes() const { return out[0] * out[1] * out[2] * out[3] * element_size(block.dtype); }
};

// What a call of one block after the other decides again each time, decided once: where each output lies between the
// steps, how the blocks are cut up, which of them share a parallel region. 60 us of ResNet-56's 29 steps.
class Program {
 public:
  // Steps one after the other; sources count from the first one.
  explicit Program(std::vector<Step> steps);
  ~Program();

  const Step& first() const { return steps_.front(); }
  const Step& last() const { return steps_.back(); }

  // Reads the image x of the first step's shape and writes the last step's output. Several threads may do so at once.
  // Throws std::invalid_argument on a pack of another instruction set.
  void run(const void* x, void* out, const Parallel&) const;

 private:
  struct Prepared;
  // One memory for outputs of the same size that are not needed at the same time.
  struct Memory {
    int64_t bytes;
    int from, until;  // the first step that writes to it, and the last that reads it
  };
  std::unique_ptr<Prepared> take(int threads) const;

  std::vector<Step> steps_;
  std::vector<Memory> memories_;  // the first is the program's output
  std::vector<size_t> place_;     // of each step's output among them
  bool piecewise_ = false;        // memory that nobody reads any more is given back on the way
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Prepared>> idle_;  // as many as ran at once
};

}  // namespace resnet_fused::cpu
