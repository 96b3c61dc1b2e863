// The header of a buffer that holds weights packed ahead: what they were packed for.
#pragma once

#include "cpu/kernels/matrix.h"
#include "cpu/kernels/shape.h"

#define RNNKIT_STRING(name) RNNKIT_STRING_OF(name)
#define RNNKIT_STRING_OF(name) #name

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell>
constexpr const char* kCellName = nullptr;
#define X(Cell, name) \
  template <>         \
  inline constexpr const char* kCellName<Cell> = name;
RNNKIT_CELLS(X)
#undef X

// The cell's name in the ops.
template <class Cell, class S>
const char* name_of([[maybe_unused]] const Layer<S>& layer) {
  if constexpr (kIsRegistered<Cell>)
    return layer.cell->name;
  else
    return kCellName<Cell>;
}

// FNV-1a of a cell's name: a graph's has some kilobytes.
inline uint64_t hash_of(const char* name) {
  uint64_t hash = 0xcbf29ce484222325;
  for (; *name != 0; ++name) hash = (hash ^ static_cast<unsigned char>(*name)) * 0x100000001b3;
  return hash;
}

// Aligned like the panels that follow it.
struct alignas(64) PackedHeader {
  char magic[8] = "rnnkit3", isa[16] = RNNKIT_STRING(RNNKIT_CAPABILITY);
  uint64_t cell;
  PanelFormat format;
  int64_t input, hidden, projected, directions, heads, multiplies_input;

  template <class S>
  PackedHeader(const char* name, const Layer<S>& layer)
      : cell(hash_of(name)),
        format(kFormat<S>),
        input(layer.input),
        hidden(layer.hidden),
        projected(layer.projected),
        directions(layer.directions),
        heads(layer.heads),
        multiplies_input(layer.multiplies_input) {}
  bool operator==(const PackedHeader&) const = default;
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
