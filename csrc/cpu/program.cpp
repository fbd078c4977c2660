#include "program.h"

#include <algorithm>

#include "isa.h"
#include "memory.h"

namespace resnet_fused::cpu {
namespace {

// What lies between steps that run together, at most: the four stages of ResNet-50 at batch 16 would take 50 MB more
// than one after the other.
constexpr int64_t kTogetherBytes = 32 << 20;

// Memory of the pool.
struct PoolDelete {
  void operator()(void* p) const { pool_free(p); }
};
using Pooled = std::unique_ptr<void, PoolDelete>;

bool is_block(const Step& s) { return s.layers.empty() && !s.head.weight; }

}  // namespace

// The steps in groups that run as one, for one run at a time.
struct Program::Prepared {
  struct Group {
    int begin, end;                    // of the steps
    std::unique_ptr<Sequence> blocks;  // null: a head
  };
  const Kernels* kernels;
  int threads;
  std::vector<Group> groups;
};

Program::Program(std::vector<Step> steps) : steps_(std::move(steps)) {
  // From the last output back: one that is read for the last time before another is written takes the same memory, and
  // so most take that of the program's output.
  const int count = static_cast<int>(steps_.size());
  memories_.push_back({last().out_bytes(), count - 1, count});
  place_.assign(static_cast<size_t>(count), 0);
  int64_t total = 0;
  for (int i = count - 2; i >= 0; --i) {
    int last = i;
    for (int j = i + 1; j < count; ++j)
      if (steps_[j].x == i || (steps_[j].block.residual && steps_[j].residual == i)) last = j;
    const int64_t bytes = steps_[i].out_bytes();
    auto free = std::find_if(memories_.begin(), memories_.end(),
                             [&](const Memory& m) { return m.bytes == bytes && last < m.from; });
    if (free == memories_.end()) {
      total += bytes;
      free = memories_.insert(memories_.end(), Memory{bytes, i, last});
    }
    free->from = i;
    place_[i] = static_cast<size_t>(free - memories_.begin());
  }
  piecewise_ = total > kTogetherBytes;
}

Program::~Program() = default;

std::unique_ptr<Program::Prepared> Program::take(int threads) const {
  const Kernels& now = kernels();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    while (!idle_.empty()) {
      std::unique_ptr<Prepared> p = std::move(idle_.back());
      idle_.pop_back();
      if (p->kernels == &now && p->threads == threads) return p;
    }
  }
  auto p = std::make_unique<Prepared>(Prepared{&now, threads, {}});
  const int count = static_cast<int>(steps_.size());
  for (int begin = 0, end; begin < count; begin = end) {
    end = begin + 1;
    auto& group = p->groups.emplace_back();
    group.begin = begin;
    if (is_block(steps_[begin])) {
      // With what they write first, memory is made room for.
      auto starts = [&](int i) { return piecewise_ && memories_[place_[i]].from == i && place_[i]; };
      while (end < count && is_block(steps_[end]) && !starts(end)) ++end;
      std::vector<Block> blocks;
      for (int i = begin; i < end; ++i) blocks.push_back(steps_[i].block);
      group.blocks = std::make_unique<Sequence>(now, std::move(blocks), threads);
    } else if (!steps_[begin].head.weight) {
      group.blocks = std::make_unique<Sequence>(now, steps_[begin].layers, threads);
    }
    group.end = end;
  }
  return p;
}

void Program::run(const void* x, void* out, const Parallel& parallel) const {
  std::unique_ptr<Prepared> prepared = take(parallel.threads);
  std::vector<Pooled> pooled(memories_.size());
  auto output = [&](int i) { return place_[i] ? pooled[place_[i]].get() : out; };
  auto source = [&](int i) -> const void* { return i == Step::kInput ? x : output(i); };
  for (const Prepared::Group& group : prepared->groups) {
    for (size_t m = 1; m < memories_.size() && piecewise_; ++m)
      if (memories_[m].until < group.begin) pooled[m].reset();
    for (int i = group.begin; i < group.end; ++i)
      if (Pooled& memory = pooled[place_[i]]; place_[i] && !memory)
        memory.reset(pool_allocate(static_cast<size_t>(memories_[place_[i]].bytes)));
    const Step& first = steps_[group.begin];
    if (first.head.weight) {
      Head head = first.head;
      head.x = source(first.x);
      head.out = output(group.begin);
      run_head(*prepared->kernels, head, parallel);
    } else if (!first.layers.empty()) {
      char* const buffer = static_cast<char*>(output(group.begin));
      copy_into_buffer(first.dense, source(first.x), first.block.x_pitch, buffer, parallel);
      for (size_t l = 0; l < first.layers.size(); ++l)
        group.blocks->bind(l, buffer, nullptr,
                           buffer + (static_cast<char*>(first.layers[l].out) - static_cast<char*>(first.block.out)));
      group.blocks->run(parallel);
    } else {
      for (int i = group.begin; i < group.end; ++i) {
        const Step& s = steps_[i];
        group.blocks->bind(static_cast<size_t>(i - group.begin), source(s.x),
                           s.block.residual ? source(s.residual) : nullptr, output(i));
      }
      group.blocks->run(parallel);
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(prepared));
}

}  // namespace resnet_fused::cpu
