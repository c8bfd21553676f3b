// aten operators of the npu device, computed by torch's CPU kernels on the same memory.
//
// torch_npu keeps what it is tested for here: allocation, views, copies between host and device, reading a scalar.
// Every other operator that has a CPU kernel is redirected. Before it computes, all that its stream was given is done,
// so its result stands where the stream's order wants it.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "torch_npu/csrc/core/npu/NPUStream.h"

extern "C" int host_cann_drain(void* stream);

namespace {

using c10::DispatchKey;
using torch::jit::Stack;

constexpr auto NPU = c10::DeviceType::PrivateUse1;

bool on_npu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == NPU; }

// The same memory as a tensor of the host.
at::Tensor host_of(const at::Tensor& tensor) {
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                       [keep = tensor](void*) {}, options);
}

// Wait for the current stream of a device. A stream that failed raises as torch_npu does. torch_npu empties the task
// queue of the device that is current, so this one has to be.
void settle(c10::DeviceIndex device) {
  const c10::DeviceGuard guard(c10::Device(NPU, device));
  auto stream = c10_npu::getCurrentNPUStream(device);
  if (host_cann_drain(stream.stream()) != 0) stream.synchronize();
}

// One call: its device tensors with their host faces, and the device its new tensors belong to.
class Call {
 public:
  at::Tensor in(const at::Tensor& tensor) {
    if (!on_npu(tensor)) {
      host_ = host_ || (tensor.defined() && tensor.dim() > 0);
      return tensor;
    }
    if (!device_) device_ = tensor.device();
    TORCH_CHECK(*device_ == tensor.device(), "Expected all tensors to be on the same device, but found at least two "
                "devices, ", *device_, " and ", tensor.device(), "!");
    seen_.emplace_back(tensor, host_of(tensor));
    return seen_.back().second;
  }

  c10::IValue in(const c10::IValue& value) {
    if (value.isTensor()) return in(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& item : value.toTensorVector()) made.push_back(in(item));
      return made;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> made;
      const bool host = host_;
      for (const std::optional<at::Tensor>& item : value.toOptionalTensorVector()) {
        made.push_back(item ? std::optional<at::Tensor>(in(*item)) : std::nullopt);
      }
      host_ = host;  // indices may be the host's
      return made;
    }
    if (value.isDevice() && value.toDevice().type() == NPU) {
      device_ = value.toDevice();
      return c10::Device(at::kCPU);
    }
    return value;
  }

  // Both kinds of memory in one call are an error on a chip: here the CPU's kernel would not notice.
  void check(const c10::OperatorHandle& op) const {
    TORCH_CHECK(!host_ || seen_.empty(), "Expected all tensors to be on the same device, but found at least two devices, ",
                device_.value_or(c10::Device(NPU)), " and cpu! (in ", op.schema().name(), ")");
  }

  c10::Device device() {
    if (!device_ || device_->index() < 0) device_ = c10::impl::VirtualGuardImpl(NPU).getDevice();
    return *device_;
  }

  at::Tensor out(const at::Tensor& result) {
    if (!result.defined() || !result.device().is_cpu()) return result;
    for (auto& [tensor, host] : seen_) {
      if (!host.is_same(result)) continue;
      if (tensor.sizes() != result.sizes()) {  // an `out` argument that was made larger
        tensor.resize_(result.sizes());
        host_of(tensor).copy_(result);
      }
      return tensor;
    }
    auto made = at::empty_strided(result.sizes(), result.strides(), result.options().device(device()));
    if (result.numel()) host_of(made).copy_(result);
    return made;
  }

  c10::IValue out(const c10::IValue& value) {
    if (value.isTensor()) return out(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& item : value.toTensorVector()) made.push_back(out(item));
      return made;
    }
    return value;
  }

 private:
  std::optional<c10::Device> device_;
  bool host_ = false;
  std::vector<std::pair<at::Tensor, at::Tensor>> seen_;
};

void redirected(const c10::OperatorHandle& op, Stack* stack) {
  Call call;
  const size_t arguments = op.schema().arguments().size();
  for (size_t i = stack->size() - arguments; i < stack->size(); ++i) (*stack)[i] = call.in((*stack)[i]);
  call.check(op);
  const c10::DeviceGuard guard(call.device());
  settle(call.device().index());
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  const size_t returns = op.schema().returns().size();
  for (size_t i = stack->size() - returns; i < stack->size(); ++i) (*stack)[i] = call.out((*stack)[i]);
}

// An operator that is made of others, and has no kernel of its own for the CPU: its CPU entry is that recipe, which
// calls them on the device.
void composed(const c10::OperatorHandle& op, Stack* stack) {
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
}

// aten::copy_: where bytes move as they are, torch_npu moves them. A change of type or of order is a computation.
class Copy {
 public:
  at::Tensor& operator()(at::Tensor& self, const at::Tensor& source, bool non_blocking) const {
    const c10::DeviceGuard guard(on_npu(self) ? self.device() : source.device());
    if (on_npu(self) && on_npu(source)) {
      settle(source.device().index());
      if (self.device() != source.device()) settle(self.device().index());
      host_of(self).copy_(host_of(source));
      return self;
    }
    const bool plain = self.dtype() == source.dtype() && self.sizes() == source.sizes() && self.is_contiguous() &&
                       source.is_contiguous() && self.is_conj() == source.is_conj() && self.is_neg() == source.is_neg();
    if (plain) return original(self, source, non_blocking);
    if (on_npu(self)) {
      auto made = at::empty(self.sizes(), source.options().dtype(self.dtype())).copy_(source);
      if (self.is_contiguous()) return original(self, made, false);
      auto moved = at::empty(self.sizes(), self.options());
      original(moved, made, false);
      return (*this)(self, moved, false);
    }
    auto moved = at::empty(source.sizes(), source.options());
    (*this)(moved, source, false);
    auto made = at::empty(source.sizes(), source.options().device(at::kCPU));
    original(made, moved, false);
    return self.copy_(made);
  }

 private:
  at::Tensor& original(at::Tensor& self, const at::Tensor& source, bool non_blocking) const {
    Stack stack{self, source, non_blocking};
    kernel_.callBoxed(op_, c10::DispatchKeySet(DispatchKey::PrivateUse1), &stack);
    return self;
  }

  c10::OperatorHandle op_ = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  c10::SafeKernelFunction kernel_ = op_.getComputedKernelForDispatchKey(DispatchKey::PrivateUse1);
};

bool gives_a_view(const c10::FunctionSchema& schema) {
  for (const auto& item : schema.returns()) {
    if (item.alias_info() && !item.alias_info()->isWrite()) return true;
  }
  return false;
}

std::vector<std::unique_ptr<torch::Library>>& libraries() {
  static auto* all = new std::vector<std::unique_ptr<torch::Library>>;
  return *all;
}

torch::Library& library(DispatchKey key) {
  libraries().push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "aten", key, __FILE__, __LINE__));
  return *libraries().back();
}

// Redirect these operators (names after `aten::`, which torch_npu has for the device or for its autograd). Returns
// those that stay torch_npu's: with no CPU kernel to stand for them, or views.
std::vector<std::string> install(const std::vector<std::string>& names) {
  auto& device = library(DispatchKey::PrivateUse1);
  auto& autograd = library(DispatchKey::AutogradPrivateUse1);
  std::vector<std::string> left;
  for (const auto& name : names) {
    const auto dot = name.find('.');
    const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
    const auto op = c10::Dispatcher::singleton().findSchema({"aten::" + name.substr(0, dot), overload});
    if (!op) continue;
    auto has = [&](DispatchKey key) { return op->hasKernelForDispatchKey(key); };
    const bool implicit = has(DispatchKey::CompositeImplicitAutograd);
    if (!has(DispatchKey::CPU) && (implicit || has(DispatchKey::CompositeExplicitAutograd))) {
      device.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&composed>());
      if (implicit) autograd.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&composed>());
    } else if (has(DispatchKey::CPU) && has(DispatchKey::PrivateUse1) && !gives_a_view(op->schema())) {
      device.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&redirected>());
    } else {
      left.push_back(name);
    }
  }
  device.impl("copy_", Copy());
  return left;
}

}  // namespace

TORCH_LIBRARY(host_cann, library) { library.def("install(str[] names) -> str[]", &install); }
