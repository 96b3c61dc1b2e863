// Memory of tensors and of calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

namespace rnnkit {

// An uninitialized tensor for results or for the reserve. Large parts are asked for in huge pages: the kernel then maps
// them at a quarter of the cost, and a scan finds them without a TLB miss for each row.
at::Tensor allocate(at::IntArrayRef shape, const at::TensorOptions& options);

// Whether the tensor's memory is there: a storage can be freed, or cut, under it (resize_).
bool has_memory(const at::Tensor& tensor);

// Scratch memory for one call. A thread keeps up to 4 MiB for its next call: to map it anew would take longer than many
// a call does. A call has it for itself: a signal's handler may make another one meanwhile, on the same thread. Where
// tests ask torch to fill fresh memory, it is always fresh.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::byte* begin() const { return static_cast<std::byte*>(memory_.mutable_data_ptr()); }

 private:
  static thread_local at::Tensor kept_;
  at::Tensor memory_;
  bool keeps_ = false;
};

}  // namespace rnnkit
