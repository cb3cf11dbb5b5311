// How work over [outer, channels, inner] is cut into blocks: by the shape alone.
#pragma once

#include "bn_act.h"

namespace fastgan::cpu {
namespace {

// Outer indices [begin, end), and of each plane the elements [first, last).
struct ReductionBlock {
  int64_t begin, end, first, last;
};

// A block of a channels_last tensor is a slab of rows of about 64 KiB of floats; one of a contiguous tensor holds
// about as many elements of one channel, of a large plane a stretch.
class ReductionBlocks {
 public:
  explicit ReductionBlocks(const BnActShape& shape) : outer_(shape.outer), inner_(shape.inner), stretch_(shape.inner) {
    constexpr int64_t kElements = 16384, kMostBlocks = 1024;
    if (inner_ > kElements) {
      const int64_t pieces = divide_up(inner_, kElements), most = at_least_1(kMostBlocks / at_least_1(outer_));
      stretch_ = divide_up(inner_, pieces < most ? pieces : most);
      stretches_ = divide_up(inner_, stretch_);
    }
    const int64_t row = inner_ == 1 ? shape.channels : stretch_;
    size_ = at_least_1(kElements / at_least_1(row));
    const int64_t least = divide_up(outer_, kMostBlocks);
    if (size_ < least) size_ = least;
  }

  int64_t count() const { return divide_up(outer_, size_) * stretches_; }

  ReductionBlock operator[](int64_t block) const {
    return at(block / stretches_ * size_, block % stretches_ * stretch_);
  }

  // Calls f(index, block) in order.
  template <typename F>
  void for_each(const F& f) const {
    int64_t index = 0;
    for (int64_t begin = 0; begin < outer_; begin += size_) {
      for (int64_t first = 0, part = 0; part < stretches_; ++part, first += stretch_) f(index++, at(begin, first));
    }
  }

 private:
  ReductionBlock at(int64_t begin, int64_t first) const {
    const int64_t end = begin + size_, last = first + stretch_;
    return {begin, end < outer_ ? end : outer_, first, last < inner_ ? last : inner_};
  }
  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t at_least_1(int64_t value) { return value > 1 ? value : 1; }

  int64_t outer_, inner_;
  int64_t size_;           // outer indices a block
  int64_t stretch_;        // elements of a plane a block
  int64_t stretches_ = 1;  // of a plane
};

}  // namespace
}  // namespace fastgan::cpu
