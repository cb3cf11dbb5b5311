// Prints the dynamic shared memory of the convolutions' main loops: the start of the kernel's name, a tab, bytes a block.
// cuda_compile_report.py compiles this for the host, since ptxas only knows the static part.
#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <typeinfo>

#include "../csrc/cuda/conv4x4s2_dense.cuh"
#include "../csrc/cuda/conv4x4s2_gather.cuh"
#include "../csrc/cuda/conv4x4s2_thin.cuh"
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
  print<Math, Tile>("dense_up_kernel", dense_up_shared_bytes<Tile>(kDenseDepth));
}

template <typename... Maths>
void print_all() {
  (print_main_loops<Maths, LargeTile>(), ...);
  (print_main_loops<Maths, SmallTile>(), ...);
  (print<Maths>("dense_weight_gradient_kernel", dense_weight_gradient_shared_bytes<Maths>()), ...);
}

// Of the loops for thin images, what the geometry that needs most asks for.
template <int kChannels>
void print_thin(const char* type) {
  size_t down = 0, up = 0, weight_gradient = 0;
  for (int64_t height = 1; height <= kThinPixels; ++height) {
    for (int64_t width = 1; width <= kThinPixels; ++width) {
      Conv4x4Args args;
      args.type = DataType::bfloat16;
      args.geometry = {1, height, width, kThinColumns, 2 * height, 2 * width, kChannels, 2};
      const ThinTiles tiles = thin_tiles(args.geometry, nullptr);
      if (is_thin_down(args)) {
        down = std::max(down, thin_down_shared_bytes(tiles));
        weight_gradient = std::max(weight_gradient, thin_weight_gradient_shared_bytes(tiles, kChannels));
      }
      args.direction = Conv4x4Direction::up;
      if (is_thin_up(args)) up = std::max(up, thin_up_shared_bytes<kChannels>(width));
    }
  }
  std::printf("thin_down_kernel<%s, %d\t%zu\n", type, kChannels, down);
  std::printf("thin_up_kernel<%s, %d\t%zu\n", type, kChannels, up);
  std::printf("thin_weight_gradient_kernel<%s, %d\t%zu\n", type, kChannels, weight_gradient);
}

int main() {
  print_all<Bfloat16Math, Float16Math>();
  for (const char* type : {"BFloat16", "Half"}) {
    print_thin<1>(type), print_thin<2>(type), print_thin<3>(type), print_thin<4>(type);
  }
}
