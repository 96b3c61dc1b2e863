// A block and a warp on the host, one lane after the other: what device.cuh does with instructions, by definition.
// Built for tests alone, so that errors of splitting, tails, layout and order show without a GPU.
#pragma once

#include <array>
#include <stdexcept>
#include <vector>

#include "cuda/scan.h"

namespace rnnkit::cuda {

struct HostWarp {
  struct Vector {
    std::array<std::array<uint32_t, 4>, 32> words;
  };
  using Sums = std::array<std::array<float, 4>, 32>;
  int index;

  static Vector upper(const Vector& words, int first) {
    Vector found{};
    for (int lane = 0; lane < 32; ++lane)
      for (int k = 0; k < 2; ++k) found.words[lane][2 * k] = words.words[lane][first + k];
    return found;
  }
  static Vector upper01(const Vector& words) { return upper(words, 0); }
  static Vector upper23(const Vector& words) { return upper(words, 2); }
  void clear(Sums& sums) const { sums = {}; }

  template <class Byte>
  Byte* lanes(Byte* fragment) const {
    return fragment;
  }
  Vector read(const std::byte* fragment) const {
    Vector vector;
    std::memcpy(&vector, fragment, sizeof vector);
    return vector;
  }
  Vector read_exchanged(const std::byte* fragment) const { return read(fragment); }

  template <class S>
  static float dot(uint32_t a, uint32_t b, bool precise) {
    if constexpr (std::is_same_v<S, float>) {
      const float x = bits_as<float>(a), y = bits_as<float>(b);
      return precise ? x * y : rounded_to_tf32(x) * rounded_to_tf32(y);
    } else {
      float sum = 0;
      for (int half = 0; half < 2; ++half)
        sum += widened(S{uint16_t(a >> 16 * half)}) * widened(S{uint16_t(b >> 16 * half)});
      return sum;
    }
  }

  template <class S>
  void multiply_add(Sums& sums, const Vector& a01, const Vector& a23, const Vector& b, bool precise) const {
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column)
        for (int lane = 0; lane < 4; ++lane)
          for (int word = 0; word < 4; ++word)
            sums[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2] +=
                dot<S>((word < 2 ? a01 : a23).words[row % 8 * 4 + lane][word % 2 * 2 + row / 8],
                       b.words[column * 4 + lane][word], precise);
  }

  void store(const Sums& sums, float* to, int stride, bool both) const {
    for (int row = 0; row < (both ? 16 : 8); ++row)
      for (int column = 0; column < 8; ++column)
        to[row * stride + column] = sums[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2];
  }

  // Blocks run in turn: whoever would wait here would wait for ever.
  void wait(const uint32_t* flags, int first, int last, uint32_t epoch) const {
    for (int block = first; block <= last; ++block)
      if (flags[block * kFlagStride] < epoch) throw std::logic_error("a block waits for one that comes after it");
  }
};

struct HostBlock {
  int index;
  std::vector<std::vector<std::byte>>* memories;
  int cluster;

  template <class R>
  using PerThread = std::vector<R>;

  template <class R, class Body>
  void threads(std::vector<R>& registers, const Body& body) const {
    registers.resize(kThreads);
    for (int thread = 0; thread < kThreads; ++thread) body(thread, registers[thread]);
  }
  template <class Body>
  void warps(const Body& body) const {
    for (int warp = 0; warp < kWarps; ++warp) body(HostWarp{warp});
  }
  void sync() const {}
  // In a cluster: the blocks of a cluster follow one another, and each knows where all have their shared memory.
  template <class T>
  T* peer(int rank, T* shared) const {
    return shared + ((*memories)[index - index % cluster + rank].data() - (*memories)[index].data());
  }
  void arrive() const {}
  void wait() const {}
  void publish(uint32_t* flag, uint32_t epoch) const { *flag = epoch; }
};

}  // namespace rnnkit::cuda
