#include "cpu/memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <utility>

namespace rnnkit {

using at::Tensor;

Tensor allocate(at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor tensor = at::empty(shape, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + tensor.nbytes()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

bool has_memory(const Tensor& tensor) {
  if (tensor.layout() != at::kStrided || !tensor.has_storage()) return false;
  const size_t size = tensor.itemsize(), offset = tensor.storage_offset();
  const size_t needed = tensor.is_contiguous()
                            ? (offset + tensor.numel()) * size
                            : at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), size, offset);
  return tensor.storage().nbytes() >= needed || tensor.numel() == 0;
}

thread_local Tensor Scratch::kept_;

Scratch::Scratch(int64_t bytes) {
  constexpr int64_t most_kept = 4 << 20;
  const auto options = at::TensorOptions(at::kByte);
  const bool filled =
      at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory();
  if (bytes > most_kept || filled) {
    memory_ = allocate({bytes}, options);
    return;
  }
  memory_ = std::exchange(kept_, Tensor());
  if (!memory_.defined() || memory_.numel() < bytes) memory_ = at::empty({bytes}, options);
  keeps_ = true;
}

Scratch::~Scratch() {
  if (keeps_) kept_ = std::move(memory_);
}

}  // namespace rnnkit
