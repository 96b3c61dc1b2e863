#include "cpu/interpreter.h"

#include <c10/util/Exception.h>

#include <string_view>

namespace rnnkit {
namespace {

#define X(name) #name,
constexpr std::string_view kOperations[] = {RNNKIT_OPERATIONS(X) "constant"};
constexpr std::string_view kSources[] = {RNNKIT_SOURCES(X)};
constexpr std::string_view kTargets[] = {RNNKIT_TARGETS(X)};
#undef X

template <size_t N>
int32_t place_of(std::string_view name, const std::string_view (&names)[N]) {
  for (size_t i = 0; i < N; ++i)
    if (names[i] == name) return i;
  TORCH_CHECK(false, "expected the name of an instruction, got '", std::string(name), "'");
}

Instruction read(const WrittenInstruction& written) {
  const auto& [written_name, to, a, b, c, value] = written;
  const std::string_view name = written_name;
  if (name.starts_with("load ")) return {Operation::load, to, place_of(name.substr(5), kSources), b, c, value};
  if (name.starts_with("store ")) return {Operation::store, to, place_of(name.substr(6), kTargets), b, c, value};
  return {static_cast<Operation>(place_of(name, kOperations)), to, a, b, c, value};
}

Program read(const WrittenProgram& written) {
  const auto& [registers, instructions] = written;
  std::vector<Instruction>& read_instructions = *new std::vector<Instruction>;  // for good, as registered cells are
  for (const WrittenInstruction& instruction : instructions) read_instructions.push_back(read(instruction));
  return {read_instructions.data(), read_instructions.data() + read_instructions.size(), registers};
}

}  // namespace

const Programs* make_programs(const std::array<WrittenProgram, kFunctions>& written) {
  return new Programs{read(written[0]), read(written[1]), read(written[2]),
                      read(written[3]), read(written[4]), read(written[5])};
}

}  // namespace rnnkit
