// Memory of results, and scratch memory of calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>

namespace rnnkit {

// Returns an uninitialized tensor for results or the reserve. Linux is advised to use huge pages for it: mapping them
// costs a quarter, and a scan does not have a TLB miss for each row.
at::Tensor allocate(at::IntArrayRef shape, const at::TensorOptions& options);

// Whether the tensor's storage still has memory for it: resize_ can free or shrink a storage.
bool has_memory(const at::Tensor& tensor);

// Scratch memory for one call. A thread keeps up to 4 MiB of it for its next call, since mapping memory can take longer
// than a small call. During a call nobody else can get that memory: a signal handler may run another call on the same
// thread. If torch is told to fill uninitialized memory, as in tests, the memory is always fresh.
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
