// What the kernels of CPUs and GPUs both know of a cell's states and of the reserve.
#pragma once

namespace rnnkit {

constexpr int kMaxStates = 4;  // of any cell; arrays over a cell's states are as long

// What the forward pass keeps in the reserve for the backward pass; names and numbers are those of rnnkit.call.Keep.
enum class Keep {
  nothing,
  states,      // the states other than h, before each step: the backward pass computes the gates again
  everything,  // the Cell::saved values
};

}  // namespace rnnkit
