// A device for tests, in main memory: its tensors are computed by the CPU's kernels, and it counts what a card would
// have to do for them. Operations over tensors of two devices are errors. docs/architecture.md says how tests use it.
//
// An operation runs by the boxed fallback `run_on_cpu`: its tensors are seen as CPU tensors of the same memory, and
// what the kernel allocates for results becomes memory of the device. Nothing is copied.

#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

namespace at::autocast {  // of ATen/autocast_mode.h, which includes every operation
TORCH_API ScalarType get_autocast_dtype(DeviceType);
TORCH_API Tensor cached_cast(ScalarType, const Tensor&, DeviceType);
}  // namespace at::autocast

using torch::jit::Stack;

namespace {

// ---- Operations --------------------------------------------------------------------------------------------------

void forget_alias(void* context) { delete static_cast<c10::Storage*>(context); }

Tensor with_storage(c10::Storage storage, DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// The same memory as a CPU tensor. Whatever keeps it keeps the storage of the device alive.
Tensor on_cpu(const Tensor& here) {
  const auto& storage = here.storage();
  c10::DataPtr data(const_cast<void*>(storage.data()), new c10::Storage(storage), &forget_alias, kCPU);
  return with_storage({c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetAllocator(kCPU), true},
                      DispatchKey::CPU, here);
}

using Adopted = std::map<c10::StorageImpl*, c10::Storage>;

// A CPU tensor that a kernel returned, as a tensor of the device with the same memory.
Tensor adopt(const Tensor& cpu, Adopted& adopted) {
  const auto& storage = cpu.storage();
  auto context = storage.data_ptr().get_context();
  if (storage.data_ptr().get_deleter() == &forget_alias)
    return with_storage(*static_cast<c10::Storage*>(context), DispatchKey::PrivateUse1, cpu);
  auto& here = adopted[storage.unsafeGetStorageImpl()];
  if (!here) {
    auto bytes = static_cast<int64_t>(storage.nbytes());
    if (bytes) count(bytes);
    auto address = const_cast<void*>(storage.data());
    auto data = bytes ? device_pointer(address, new Block{bytes, {}, storage}) : c10::DataPtr(nullptr, kDevice);
    here = c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), &device_memory, true);
  }
  return with_storage(here, DispatchKey::PrivateUse1, cpu);
}

// Give a tensor of the device the size and content that a kernel gave to its CPU twin, with other memory.
void take_over(const Tensor& here, const Tensor& cpu, Adopted& adopted) {
  bool moved = cpu.storage().data_ptr().get_deleter() != &forget_alias;
  if (!moved && cpu.sizes() == here.sizes() && cpu.strides() == here.strides()) return;
  auto made = adopt(cpu, adopted);
  if (moved) {
    auto bytes = made.storage().nbytes();
    here.storage().set_data_ptr_noswap(made.storage().unsafeGetStorageImpl()->set_data_ptr({nullptr, kDevice}));
    here.storage().set_nbytes(bytes);
  }
  here.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
}

// Operations whose result the host has to see: a card waits for them.
const std::set<std::string> kSeenByHost = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave",
};

struct Call {  // the arguments of one operation, prepared for the CPU
  const c10::FunctionSchema& schema;
  bool here = false, elsewhere = false;
  std::vector<std::pair<Tensor, Tensor>> written;  // (of the device, its CPU twin)
  std::vector<Tensor> indices;                     // in main memory: a card uploads them

  Tensor swapped(const Tensor& tensor, bool is_written) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kHere) {
      elsewhere |= tensor.dim() > 0 || is_written;
      return tensor;
    }
    here = true;
    auto cpu = on_cpu(tensor);
    if (is_written) written.emplace_back(tensor, cpu);
    return cpu;
  }
  c10::IValue swapped(const c10::IValue& value, bool is_written) {
    if (value.isTensor()) return swapped(value.toTensor(), is_written);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(swapped(each, is_written));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> each : value.toOptionalTensorList()) {
        if (each && each->defined() && each->device().is_cpu() && here) indices.push_back(*each);
        else if (each) each = swapped(*each, is_written);
        list.push_back(each);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == kHere) return c10::Device(kCPU);
    return value;
  }
};

void refuse(const std::string& what, const std::string& operation) {
  auto line = tell("mismatch", operation, 0, false);
  TORCH_CHECK(false, what, " in ", operation, line.empty() ? "" : " at ", line);
}

c10::IValue adopt(const c10::IValue& value, const Call& call, Adopted& adopted) {
  auto one = [&](const Tensor& cpu) {
    if (!cpu.defined() || !cpu.device().is_cpu()) return cpu;
    for (const auto& [here, twin] : call.written)
      if (twin.is_same(cpu)) return here;
    return adopt(cpu, adopted);
  };
  if (value.isTensor()) return one(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& each : value.toTensorVector()) list.push_back(one(each));
    return list;
  }
  return value;
}

// Run `op` with the arguments on the stack by its CPU kernel.
void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  auto begin = stack->size() - schema.arguments().size();
  Call call{schema};
  bool draws = op.hasTag(Tag::nondeterministic_seeded), drew_from_given = false, device_asked = false;
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    auto& value = (*stack)[begin + i];
    device_asked |= value.isDevice() && value.toDevice().type() == kHere;
    if (value.isGenerator()) {
      auto generator = value.toGenerator();
      if (!generator.defined()) continue;
      if (generator.device().type() != kHere)
        refuse("a generator of " + generator.device().str() + " draws for a tensor of the device", name);
      value = static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->cpu;
      drew_from_given = true;
      continue;
    }
    const auto* alias = schema.arguments()[i].alias_info();
    value = call.swapped(value, alias && alias->isWrite());
  }
  if (call.here && call.elsewhere) refuse("tensors of two devices", name);
  for (const auto& index : call.indices)
    if (!inside && name != "aten::index")  // which torch has uploaded before, to see their shapes
      tell("upload", name, static_cast<int64_t>(index.nbytes()), true);
  if (!inside) {
    std::lock_guard<std::mutex> held(lock);
    operations[name]++;
  }
  if (!inside && kSeenByHost.count(name)) tell("read", name, 0, true);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    std::optional<DrawsHere> drawing;
    if (draws && !drew_from_given) drawing.emplace();
    inside++;
    try {
      op.callBoxed(stack);
    } catch (...) {
      inside--;
      throw;
    }
    inside--;
  }
  Adopted adopted;
  for (const auto& [here, cpu] : call.written) take_over(here, cpu, adopted);
  if (call.here || device_asked)
    for (auto i = stack->size() - schema.returns().size(); i < stack->size(); i++)
      (*stack)[i] = adopt((*stack)[i], call, adopted);
}

c10::OperatorHandle operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}
void convolution(const c10::OperatorHandle&, Stack* stack) { run_on_cpu(operation("aten::convolution"), stack); }
void convolution_backward(const c10::OperatorHandle&, Stack* stack) {
  // (grad, input, weight, stride, padding, dilation, transposed, output_padding, groups, mask): sizes of the bias come in
  auto values = torch::jit::pop(*stack, 10);
  auto weight = values[2].toTensor();
  auto channels = values[6].toBool() ? weight.size(1) * values[8].toInt() : weight.size(0);
  values.insert(values.begin() + 3, c10::IValue(std::vector<int64_t>{channels}));
  for (auto& each : values) stack->push_back(std::move(each));
  run_on_cpu(operation("aten::convolution_backward"), stack);
}

int64_t attention_kernel(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                         double dropout, bool causal, std::optional<double> scale, bool gqa) {
  auto cpu_mask = mask && mask->defined() ? std::optional<Tensor>(on_cpu(*mask)) : mask;
  return _fused_sdp_choice(on_cpu(query), on_cpu(key), on_cpu(value), cpu_mask, dropout, causal, scale, gqa);
}

Tensor empty_here(c10::SymIntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
                  std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory,
                                   c10::DispatchKeySet(DispatchKey::PrivateUse1),
                                   dtype.value_or(c10::get_default_dtype_as_scalartype()), format);
}
Tensor empty_strided_here(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<ScalarType> dtype,
                          std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &device_memory, c10::DispatchKeySet(DispatchKey::PrivateUse1),
                                           dtype.value_or(c10::get_default_dtype_as_scalartype()));
}

Tensor as_cpu(const Tensor& tensor) { return tensor.device().type() == kHere ? on_cpu(tensor) : tensor; }

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  bool reads = to.device().is_cpu(), uploads = from.device().is_cpu();
  if (!inside && (reads || uploads)) {
    const auto& host = reads ? to : from;
    bool waits = !(non_blocking && is_pinned(host.storage().data()));
    tell(reads ? "read" : "upload", "aten::copy_", static_cast<int64_t>(from.nbytes()), waits);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  as_cpu(to).copy_(as_cpu(from));
  return to;
}
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}
Scalar item(const Tensor& tensor) {
  if (!inside) tell("read", "aten::item", static_cast<int64_t>(tensor.element_size()), true);
  at::AutoDispatchBelowADInplaceOrView below;
  return on_cpu(tensor).item();
}
const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<MemoryFormat> format) {
  return native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}
Tensor view(const Tensor& self, c10::SymIntArrayRef size) { return native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }
Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  auto begin = offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), begin);
}
Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
Tensor& set_storage(Tensor& self, Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  return native::set_storage_cpu_(self, std::move(source), offset.guard_int(__FILE__, __LINE__),
                                  C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
void record_stream(Tensor&, c10::Stream) {}

// ---- Autocast: the lists of torch for CUDA (ATen/autocast_mode.h) ----------------------------------------------------

const char* const kInLower[] = {
    "_convolution.deprecated", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "prelu", "addmm", "addmv", "addr", "matmul",
    "einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot",
    "scaled_dot_product_attention",
};
const char* const kInFloat[] = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "nll_loss",
    "nll_loss2d", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "binary_cross_entropy_with_logits",
    "dist", "pdist", "cdist", "renorm", "logsumexp", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "sum", "sum.dim_IntList", "norm.Scalar", "norm.ScalarOpt_dim",
};
const char* const kInWidest[] = {"addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler",
                               "index_put", "tensordot", "scatter_add", "cat", "stack"};

template <typename Change>
void each_tensor(const c10::OperatorHandle& op, Stack* stack, const Change& change) {
  for (auto i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined()) value = change(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(change(each));
      value = list;
    }
  }
}
void run_as(const c10::OperatorHandle& op, Stack* stack, std::optional<ScalarType> dtype) {
  c10::impl::ExcludeDispatchKeyGuard off(DispatchKey::AutocastPrivateUse1);
  if (dtype) each_tensor(op, stack, [&](const Tensor& t) { return autocast::cached_cast(*dtype, t, kHere); });
  op.callBoxed(stack);
}
void run_lower(const c10::OperatorHandle& op, Stack* stack) { run_as(op, stack, autocast::get_autocast_dtype(kHere)); }
void run_in_float(const c10::OperatorHandle& op, Stack* stack) {
  // a dtype that is asked for stays, also where it is an argument
  const auto& arguments = op.schema().arguments();
  auto begin = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); i++)
    if (arguments[i].name() == "dtype" && !(*stack)[begin + i].isNone()) return run_as(op, stack, std::nullopt);
  run_as(op, stack, kFloat);
}
void run_in_widest(const c10::OperatorHandle& op, Stack* stack) {
  bool has_float = false;
  each_tensor(op, stack, [&](const Tensor& t) { return has_float |= t.scalar_type() == kFloat, t; });
  run_as(op, stack, has_float ? c10::ScalarType::Float : autocast::get_autocast_dtype(kHere));
}

template <auto function>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<function>();
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_kernel)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(boxed<&run_on_cpu>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_here);
  m.impl("empty_strided", empty_strided_here);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("resize_", resize);
  m.impl("view", view);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", native::unfold);
  m.impl("view_as_real", native::view_as_real);
  m.impl("view_as_complex", native::view_as_complex);
  m.impl("set_.source_Storage", [](Tensor& self, Storage source) -> Tensor& { return native::set_(self, source); });
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", native::set_tensor_);
  m.impl("record_stream", record_stream);
  // torch has slower kernels, which need more memory, for devices that lack these
  for (auto name : {"native_layer_norm", "native_group_norm", "silu_backward", "mish_backward", "_stack", "addr"})
    m.impl(name, boxed<&run_on_cpu>());
  m.impl("convolution_overrideable", boxed<&convolution>());
  m.impl("convolution_backward_overrideable", boxed<&convolution_backward>());
}

// `self.data = data` over two devices, which torch does for its own devices only. The second time both are of one kind, and
// torch renews what accumulates the gradient.
TORCH_LIBRARY(pretend, m) {
  m.def("set_data(Tensor self, Tensor data) -> ()", [](const Tensor& self, const Tensor& data) {
    self.unsafeGetTensorImpl()->shallow_copy_from(data.getIntrusivePtr());
    self.set_data(data);
  });
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  for (auto name : kInLower) m.impl(name, boxed<&run_lower>());
  for (auto name : kInFloat) m.impl(name, boxed<&run_in_float>());
  for (auto name : kInWidest) m.impl(name, boxed<&run_in_widest>());
}

// ---- For tests/pretend_device/device.py, by ctypes -------------------------------------------------------------------

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

EXPORT void pretend_start(Listener to) {
  static bool registered = (c10::SetAllocator(kHere, &device_memory), RegisterPrivateUse1HooksInterface(new Hooks()), true);
  available = registered;
  listener = to;
}
EXPORT void pretend_stop() { available = false, listener = nullptr, limit = 0; }
EXPORT int pretend_is_available() { return available; }
EXPORT int64_t pretend_current() { return current; }
EXPORT int64_t pretend_peak() { return peak; }
EXPORT int64_t pretend_allocations() { return allocations; }
EXPORT void pretend_reset_peak() { peak = current.load(); }
EXPORT void pretend_ask_for_default_generator() { asks_for_default = true; }  // the next that Python makes
EXPORT void pretend_limit(int64_t bytes) { limit = bytes; }
// "name count" of each operation since the last call, by lines; returns the length, and writes what fits.
EXPORT int64_t pretend_operations(char* to, int64_t size, int forget) {
  std::lock_guard<std::mutex> held(lock);
  std::string text;
  for (const auto& [name, times] : operations) text += name + " " + std::to_string(times) + "\n";
  if (size > 0) std::snprintf(to, size, "%s", text.c_str());
  if (forget) operations.clear();
  return static_cast<int64_t>(text.size());
}
