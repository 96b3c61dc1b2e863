// The sizes of this machine's caches, by which work is divided among threads and kept ready.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>

namespace rnnkit {

// Bytes of a core's L1 (for data) and L2, and of the L3 that cores share; 0 for an L3 that the system does not report.
struct CacheSizes {
  int64_t l1, l2, l3;
};

namespace detail {

// In the unit of Linux's files, such as 48K; 0 if there is no such file.
inline int64_t cache_size_of_cpu0(int index) {
  char path[80], unit = 0;
  long long size = 0;
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
  std::FILE* file = std::fopen(path, "r");
  if (file == nullptr) return 0;
  const int read = std::fscanf(file, "%lld%c", &size, &unit);
  std::fclose(file);
  return read < 1 ? 0 : size * (unit == 'K' ? 1024 : unit == 'M' ? 1024 * 1024 : 1);
}

inline CacheSizes read_cache_sizes() {
  CacheSizes sizes{};
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  sizes = {sysconf(_SC_LEVEL1_DCACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE)};
#endif
  // Index 1 is the L1 for instructions.
  if (sizes.l1 <= 0) sizes.l1 = cache_size_of_cpu0(0);
  if (sizes.l2 <= 0) sizes.l2 = cache_size_of_cpu0(2);
  if (sizes.l3 <= 0) sizes.l3 = cache_size_of_cpu0(3);
  if (sizes.l1 <= 0) sizes.l1 = 32 * 1024;
  if (sizes.l2 <= 0) sizes.l2 = 512 * 1024;
  return sizes;
}

}  // namespace detail

inline const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = detail::read_cache_sizes();
  return sizes;
}

}  // namespace rnnkit
