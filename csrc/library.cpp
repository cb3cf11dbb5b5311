// Every operator schema, and the module fastgan._C.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/held_gradients.h"
#include "recording.h"

TORCH_LIBRARY(fastgan, m) {
  // Public. Stems as in fastgan/ops, csrc/ops and tests. process_group: the name of a torch.distributed group of
  // `processes` processes whose statistics batch norm takes together; '' for this process's own.
  m.def(
      "conv2d_bn_act(Tensor input, Tensor weight, Tensor? bias=None, Tensor? bn_weight=None, Tensor? bn_bias=None, "
      "Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, *, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, bool training=True, float momentum=0.1, float eps=1e-5, "
      "str activation='leaky_relu', float negative_slope=0.2, str process_group='', int processes=1) -> Tensor");
  m.def(
      "conv_transpose2d_bn_act(Tensor input, Tensor weight, Tensor? bias=None, Tensor? bn_weight=None, "
      "Tensor? bn_bias=None, Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, *, int[2] stride=1, "
      "int[2] padding=0, int[2] output_padding=0, int groups=1, int[2] dilation=1, bool training=True, "
      "float momentum=0.1, float eps=1e-5, str activation='relu', float negative_slope=0.2, "
      "str process_group='', int processes=1) -> Tensor");
  m.def(
      "conv2d_act(Tensor input, Tensor weight, Tensor? bias=None, *, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, str activation='leaky_relu', float negative_slope=0.2) -> Tensor");
  m.def(
      "conv_transpose2d_act(Tensor input, Tensor weight, Tensor? bias=None, *, int[2] stride=1, int[2] padding=0, "
      "int[2] output_padding=0, int groups=1, int[2] dilation=1, str activation='relu', float negative_slope=0.2) "
      "-> Tensor");

  // seed: int64 [] on the CPU; where it is not given and noise_std is not 0, drawn from PyTorch's generator.
  m.def(
      "batch_norm_act_noise(Tensor input, Tensor? bn_weight=None, Tensor? bn_bias=None, Tensor(a!)? running_mean=None, "
      "Tensor(b!)? running_var=None, Tensor? seed=None, *, bool training=True, float momentum=0.1, float eps=1e-5, "
      "str activation='leaky_relu', float negative_slope=0.2, float noise_std=0.0) -> Tensor");

  m.def("softmax_entropy(Tensor logits) -> (Tensor, Tensor)");
  m.def(
      "softmax_entropy_cross_entropy(Tensor logits, Tensor labels, *, int ignore_index=-100) "
      "-> (Tensor, Tensor, Tensor)");

  // What the public operators dispatch to, one for both directions of convolution.
  // forward: (output, conv_output, mean, invstd); conv_output has shape [0] unless save_for_backward.
  // backward: gradients of (input, weight, bias, bn_weight, bn_bias); shape [0] where output_mask says false.
  m.def(
      "conv_bn_act_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, int[2] stride, int[2] padding, int[2] dilation, "
      "bool transposed, int[2] output_padding, int groups, bool training, float momentum, float eps, str activation, "
      "float negative_slope, bool save_for_backward, str process_group='', int processes=1) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_bn_act_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor conv_output, Tensor mean, "
      "Tensor invstd, Tensor? bn_weight, Tensor? bn_bias, int[2] stride, int[2] padding, int[2] dilation, "
      "bool transposed, int[2] output_padding, int groups, bool training, str activation, float negative_slope, "
      "bool[5] output_mask, str process_group='', int processes=1) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_act_forward(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
      "bool transposed, int[2] output_padding, int groups, str activation, float negative_slope) -> Tensor");
  m.def(
      "conv_act_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output, int[2] stride, "
      "int[2] padding, int[2] dilation, bool transposed, int[2] output_padding, int groups, str activation, "
      "float negative_slope, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  // forward: (output, mean, invstd). backward: gradients of (input, bn_weight, bn_bias); shape [0] where output_mask says
  // false.
  m.def(
      "batch_norm_act_noise_forward(Tensor input, Tensor? bn_weight, Tensor? bn_bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor? seed, bool training, float momentum, float eps, str activation, "
      "float negative_slope, float noise_std) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_act_noise_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, Tensor? bn_weight, "
      "Tensor? bn_bias, bool training, str activation, float negative_slope, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)");

  // A whole run of layers; csrc/ops/conv_stack.h says how a layer is written into layers and numbers.
  // parameters: weight [, bias] [, bn_weight] [, bn_bias] of each layer; running: mean and variance of those that
  // have them. forward: (output, what is saved of images, and of statistics), the last two with shape [0] unless
  // save_for_backward; what stands where in them, the device's backward knows.
  // backward: gradients of input and parameters; shape [0] where output_mask says false.
  m.def(
      "conv_stack(Tensor input, Tensor[] parameters, Tensor(a!)[] running, int[] layers, float[] numbers, "
      "str process_group='', int processes=1) -> Tensor");
  m.def(
      "conv_stack_forward(Tensor input, Tensor[] parameters, Tensor(a!)[] running, int[] layers, float[] numbers, "
      "bool save_for_backward, str process_group='', int processes=1) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_stack_backward(Tensor grad_output, Tensor input, Tensor[] parameters, Tensor output, Tensor raw, "
      "Tensor statistics, int[] layers, float[] numbers, int[] output_mask, str process_group='', int processes=1) "
      "-> Tensor[]");

  // input.contiguous() in one of the memory formats, whose gradient is contiguous where input is, and the copy that it makes.
  m.def("contiguous_images(Tensor(a) input, bool channels_last) -> Tensor(a)");
  m.def("convert_images(Tensor input, bool channels_last) -> Tensor");

  // A run of a perceptron's layers; csrc/ops/linear_stack.cpp says how they are written. seeds: int64, one of the noise on the input
  // and one a layer. forward: (output, saved); `save` is 0 for nothing, 1 for what input gradients need, 2 for weights' too.
  m.def(
      "linear_stack(Tensor input, Tensor[] parameters, Tensor(a!)[] running, Tensor seeds, int[] layers, float[] numbers) "
      "-> Tensor");
  m.def(
      "linear_stack_forward(Tensor input, Tensor[] parameters, Tensor(a!)[] running, Tensor seeds, int[] layers, "
      "float[] numbers, int save) -> (Tensor, Tensor)");
  m.def(
      "linear_stack_backward(Tensor grad_output, Tensor input, Tensor[] parameters, Tensor saved, int[] layers, "
      "float[] numbers, int save, int[] output_mask) -> Tensor[]");

  // (conditional [], marginal [], cross_entropy [], mean_probabilities [K], log_normalizer [N]); without labels
  // cross_entropy is 0. An absent gradient counts as 0.
  m.def(
      "softmax_entropy_forward(Tensor logits, Tensor? labels, int ignore_index) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "softmax_entropy_backward(Tensor? grad_conditional, Tensor? grad_marginal, Tensor? grad_cross_entropy, "
      "Tensor logits, Tensor? labels, int ignore_index, Tensor mean_probabilities, Tensor log_normalizer) -> Tensor");

  // One step of Adam on the CPU, of what is float32, dense, and has a parameter's strides; else false, and nothing is changed.
  // lr_tensor, if given, replaces lr; found_inf that is not 0: true, and nothing happens.
  m.def(
      "adam_group_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled_weight_decay, "
      "Tensor? lr_tensor=None, Tensor? found_inf=None) -> bool");

  // One step of Adam; CUDA alone has it. Float32; the tensors of a parameter have its strides. steps: one [] each, counted on the
  // device. blocks_arrived: int32 [1], 0 between calls. lr_on_device, if given, replaces lr; found_inf that is not 0: nothing
  // happens.
  m.def(
      "adam_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, Tensor(e!) blocks_arrived, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool decoupled_weight_decay, Tensor? lr_on_device=None, Tensor? found_inf=None) -> ()");
}

namespace {

using namespace fastgan::cpu;

// Tasks still to be taken of a share, the next first; on cache lines of its own.
struct alignas(128) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
}  // namespace
// Clang's own OpenMP would bring a second pool of threads, and at::parallel_for is serial without. These are in the library that PyTorch
// has loaded, under the names by which GCC calls it.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num();
namespace {

template <typename F>
void on_threads(int64_t threads, const F& body) {
  if (at::in_parallel_region()) return body(0);
  const auto function = [](void* data) {
    const int thread = omp_get_thread_num();
    const at::internal::ThreadIdGuard guard(thread);
    (*static_cast<const F*>(data))(thread);
  };
  GOMP_parallel(function, const_cast<F*>(&body), static_cast<unsigned>(threads), 0);
}
#else
// Calls body(thread), for each of so many threads or, inside a parallel region, for the first alone.
template <typename F>
void on_threads(int64_t threads, const F& body) {
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) { body(thread); });
}
#endif

// Every thread has a share of neighbouring tasks, the same at every call: what it wrote in one pass is near it in the next. When it is
// done with them it takes those left of the others', so that a thread that other work holds up holds up nobody.
void run_on_torch_threads(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task);
    return;
  }
  std::vector<Share> shares(static_cast<size_t>(threads));
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next.store(tasks * i / threads, std::memory_order_relaxed);
    shares[i].end = tasks * (i + 1) / threads;
  }
  on_threads(threads, [&](int64_t first) {
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(first + i) % threads];
      for (int64_t task = share.next++; task < share.end; task = share.next++) body(context, task);
    }
  });
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i)
    if (isa_available(static_cast<Isa>(i))) names.push_back(isa_name(static_cast<Isa>(i)));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  parallel_runner = run_on_torch_threads;
  m.doc() = "The compiled part of fastgan: importing it registers torch.ops.fastgan.*";
  m.def("add_gradients_in_place", &fastgan::add_gradients_in_place);
  m.def("put_off_gradients", &fastgan::put_off_gradients);
  m.def("finish_gradients", &fastgan::finish_gradients, pybind11::call_guard<pybind11::gil_scoped_release>());
  fastgan::bind_recording(m);
  m.def("cpu_info", [] {
    pybind11::dict info;
    pybind11::list isas;
    for (const std::string& name : available_isas()) isas.append(name);
    info["cpu_isas_available"] = isas;
    info["cpu_isa"] = isa_name(active_isa());
#if defined(__x86_64__)
    info["cpu_isas_compiled"] = pybind11::make_tuple("baseline", "avx2", "avx512", "avx512_bf16", "amx");
#else
    info["cpu_isas_compiled"] = pybind11::make_tuple("baseline");
#endif
    return info;
  });
}
