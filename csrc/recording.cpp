#include "recording.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fastgan {
namespace {

using at::Tensor;
using torch::jit::Stack;

// Calls f(tensor, place in the list, or -1) for what a value holds.
template <typename F>
void for_tensors(const c10::IValue& value, const F& f) {
  if (value.isTensor()) {
    f(value.toTensor(), int64_t{-1});
  } else if (value.isList()) {
    const auto list = value.toList();
    for (size_t i = 0; i < list.size(); ++i) {
      const c10::IValue element = list.get(i);
      if (element.isTensor()) f(element.toTensor(), static_cast<int64_t>(i));
    }
  }
}

// How a tensor lies in its memory.
struct View {
  caffe2::TypeMeta dtype;
  int64_t offset;
  std::vector<int64_t> sizes, strides;

  explicit View(const Tensor& t) : dtype(t.dtype()), offset(t.storage_offset()), sizes(t.sizes().vec()), strides(t.strides().vec()) {}
  bool operator==(const View& other) const {
    return dtype == other.dtype && offset == other.offset && sizes == other.sizes && strides == other.strides;
  }
};

// Calls of operators, below autograd, in the order in which they were made. Memory is either that of a call's result, which every replay
// allocates anew, or it is there before and after: then replays read and write it where it lies.
class Recording {
 public:
  // What a call is about to be made with. To be followed by called(). Returns memory, as bytes, that was there before and is new to the
  // recording.
  std::vector<Tensor> call(const c10::OperatorHandle& op, Stack arguments);
  // What it returned: its tensors in order, undefined where it has returned none.
  void called(const std::vector<Tensor>& results);
  // Ends the recording. The tensors `kept`, results each, get in every replay the memory of the newly computed ones, and have none till then.
  void end(const std::vector<Tensor>& kept);
  void replay();

 private:
  // Argument number `argument` of a call, or what is at `place` of the list there (-1: no list), is result number `result`.
  struct Use {
    size_t argument;
    int64_t place;
    size_t result;
  };
  struct Call {
    c10::OperatorHandle op;
    Stack arguments;  // undefined tensors for results
    std::vector<Use> uses;
    size_t first_result;
    std::vector<size_t> last_used;  // results that no later call uses
  };

  std::optional<size_t> result_of(const Tensor& tensor) const;
  void release_kept();
  void run();

  std::vector<Call> calls_;
  size_t result_count_ = 0;
  std::vector<Tensor> results_;  // in a replay, those that are still needed
  std::vector<std::pair<Tensor, size_t>> kept_;
  // While recording, by a tensor's memory: autograd may make another object of a result. The weak pointers let go of the memory but not of
  // the object that stands for it, so that no other gets its address.
  struct Results {
    c10::weak_intrusive_ptr<c10::StorageImpl> memory;
    std::vector<std::pair<View, size_t>> views;
  };
  std::unordered_map<const c10::StorageImpl*, c10::Storage> found_memory_;
  std::unordered_map<const c10::StorageImpl*, Results> result_memory_;
};

std::optional<size_t> Recording::result_of(const Tensor& tensor) const {
  const auto found = result_memory_.find(tensor.storage().unsafeGetStorageImpl());
  if (found == result_memory_.end()) return std::nullopt;
  const auto& views = found->second.views;
  const auto same = std::find_if(views.rbegin(), views.rend(), [view = View(tensor)](const auto& each) { return each.first == view; });
  if (same != views.rend()) return same->second;
  TORCH_CHECK(false, "a tensor of shape ", tensor.sizes(), " is a view that no operator has made");
}

std::vector<Tensor> Recording::call(const c10::OperatorHandle& op, Stack arguments) {
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<Tensor> found;
  Call call{op, std::move(arguments), {}, result_count_, {}};
  for (size_t i = 0; i < call.arguments.size(); ++i) {
    for_tensors(call.arguments[i], [&](const Tensor& tensor, int64_t place) {
      if (!tensor.defined()) return;
      TORCH_CHECK(tensor.has_storage() && tensor.is_cpu(), op.schema().name(), " has a tensor that is no dense one on the CPU");
      const c10::Storage& storage = tensor.storage();
      if (found_memory_.count(storage.unsafeGetStorageImpl()) > 0) return;
      if (const auto result = result_of(tensor)) return call.uses.push_back({i, place, *result});
      found_memory_.emplace(storage.unsafeGetStorageImpl(), storage);
      found.push_back(at::empty({0}, at::kByte).set_(storage, 0, {static_cast<int64_t>(storage.nbytes())}, {1}));
    });
  }
  for (const Use& use : call.uses) {
    if (use.place < 0) {
      call.arguments[use.argument] = Tensor();
    } else {
      auto list = call.arguments[use.argument].toList().copy();
      list.set(use.place, Tensor());
      call.arguments[use.argument] = std::move(list);
    }
  }
  calls_.push_back(std::move(call));
  return found;
}

void Recording::called(const std::vector<Tensor>& results) {
  for (const Tensor& tensor : results) {
    if (tensor.defined()) {
      const c10::Storage& storage = tensor.storage();
      const auto memory = result_memory_.try_emplace(storage.unsafeGetStorageImpl(), Results{storage.getWeakStorageImpl(), {}}).first;
      memory->second.views.emplace_back(View(tensor), result_count_);
    }
    ++result_count_;
  }
}

void Recording::end(const std::vector<Tensor>& kept) {
  std::vector<bool> needed(result_count_);
  for (const Tensor& tensor : kept) {
    const auto result = result_of(tensor);
    TORCH_CHECK(result.has_value(), "a tensor of shape ", tensor.sizes(), " that is asked for is no result");
    needed[*result] = true;
    kept_.emplace_back(tensor, *result);
  }
  size_t end = result_count_;
  for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
    const auto use = [&](size_t result) {
      if (!needed[result]) call->last_used.push_back(result);
      needed[result] = true;
    };
    for (const Use& each : call->uses) use(each.result);
    for (size_t result = call->first_result; result < end; ++result) use(result);
    end = call->first_result;
  }
  release_kept();
  results_.assign(result_count_, Tensor());
  found_memory_.clear();
  result_memory_.clear();
}

// What they hold is then there to be taken again.
void Recording::release_kept() {
  const c10::Storage none = at::empty({0}, at::kByte).storage();
  for (const auto& [tensor, result] : kept_) tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(none);
}

void Recording::replay() {
  const at::AutoDispatchBelowADInplaceOrView below;
  release_kept();
  try {
    run();
  } catch (...) {
    for (Tensor& result : results_) result.reset();
    for (const auto& [tensor, result] : kept_)
      tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(
          at::zeros({tensor.storage_offset() + tensor.numel()}, tensor.options()).storage());
    throw;
  }
  for (const auto& [tensor, result] : kept_) {
    tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(results_[result].storage());
    results_[result].reset();
  }
}

void Recording::run() {
  Stack stack;
  for (const Call& call : calls_) {
    stack = call.arguments;
    for (size_t i = 0; i < call.uses.size();) {
      const size_t argument = call.uses[i].argument;
      if (call.uses[i].place < 0) {
        stack[argument] = results_[call.uses[i++].result];
        continue;
      }
      auto list = stack[argument].toList().copy();
      for (; i < call.uses.size() && call.uses[i].argument == argument; ++i) list.set(call.uses[i].place, results_[call.uses[i].result]);
      stack[argument] = std::move(list);
    }
    call.op.callBoxed(stack);
    size_t result = call.first_result;
    for (const c10::IValue& value : stack)
      for_tensors(value, [&](const Tensor& tensor, int64_t) { results_[result++] = tensor; });
    for (const size_t each : call.last_used) results_[each].reset();
  }
}

}  // namespace

void bind_recording(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Recording>(m, "Recording")
      .def(py::init<>())
      .def("call",
           [](Recording& self, const char* name, const char* overload, const py::args& arguments, const py::kwargs& keywords) {
             const torch::jit::ToIValueAllowNumbersAsTensors numbers(true);  // as in tensor / 2, a call of div.Tensor
             const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
             return self.call(op, torch::jit::createStackForSchema(op.schema(), arguments, keywords, std::nullopt));
           })
      .def("called",
           [](Recording& self, const py::list& results) {
             std::vector<Tensor> tensors;
             for (const py::handle each : results) tensors.push_back(each.is_none() ? Tensor() : each.cast<Tensor>());
             self.called(tensors);
           })
      .def("end", &Recording::end)
      .def("replay", &Recording::replay, py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastgan
