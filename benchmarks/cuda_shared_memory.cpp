// Prints the dynamic shared memory of the convolutions' main loops: the start of the kernel's name, a tab, bytes a block.
// cuda_compile_report.py compiles this for the host, since ptxas only knows the static part.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <typeinfo>

#include "../csrc/cuda/conv4x4s2_gather.cuh"
#include "../csrc/cuda/conv4x4s2_weight.cuh"

using namespace fastgan::cuda;

template <typename... Types>
void print(const char* kernel, size_t bytes) {
  const char* separator = "<";
  std::printf("%s", kernel);
  for (const std::type_info* type : {&typeid(Types)...}) {
    const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(type->name(), nullptr, nullptr, nullptr),
                                                      std::free);
    std::printf("%s%s", separator, name.get());
    separator = ", ";
  }
  std::printf("\t%zu\n", bytes);
}

template <typename Math, typename Tile>
void print_main_loops() {
  print<Math, Tile>("gather_kernel", gather_shared_bytes<Tile>());
  print<Math, Tile>("weight_gradient_kernel", weight_gradient_shared_bytes<Math, Tile>());
}

template <typename... Maths>
void print_all() {
  (print_main_loops<Maths, LargeTile>(), ...);
  (print_main_loops<Maths, SmallTile>(), ...);
}

int main() { print_all<Bfloat16Math, Float16Math, Tf32Math, Float32Math>(); }
