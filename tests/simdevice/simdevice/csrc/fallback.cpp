// Any operator: its CPU kernel over the same bytes, after the checks a real device makes.
//
// In: an operator and its boxed arguments. Out: results on the device. Results that alias an argument stay
// aliases; all others are copied to fresh device memory. Refuses mixed devices and mixed floating dtypes, notes
// operators whose result shape depends on values (the host must wait for it).
#include "kernels.h"

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <sstream>
#include <unordered_set>

namespace simdevice {
namespace {

using Name = std::string;

Name name_of(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  return schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
}

// the shape of the result, or a host value, depends on the data
const std::unordered_set<Name> kShapeReads = {
    "aten::nonzero",     "aten::masked_select",      "aten::_unique", "aten::_unique2",
    "aten::unique_dim",  "aten::unique_consecutive", "aten::equal",   "aten::unique_dim_consecutive",
    "aten::bincount"};

// operators that are made to read several floating dtypes
bool mixes_dtypes(const Name& name) {
  return name.rfind("aten::_scaled", 0) == 0 || name.find("quantize") != Name::npos ||
      name.find("int8pack") != Name::npos || name.find("int4pack") != Name::npos ||
      name.rfind("aten::_foreach_copy", 0) == 0;
}

bool is_mask(const at::Tensor& t) { return t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte); }

// writing by a mask is a nonzero in disguise, unless one value is written (then it is a masked_fill); reading by a
// mask calls nonzero itself
bool reads_shape(const Name& schema, const torch::jit::Stack& args) {
  if (kShapeReads.count(schema) > 0) return true;
  if (schema == "aten::repeat_interleave") return args.back().isNone();
  if (schema != "aten::_index_put_impl_" || args[2].toTensor().numel() == 1) return false;
  for (const std::optional<at::Tensor>& index : args[1].toOptionalTensorVector())
    if (index && is_mask(*index)) return true;
  return false;
}

template <class Visit>
void visit_tensors(const c10::IValue& value, const Visit& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorVector()) visit(t);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
      if (t && t->defined()) visit(*t);
  }
}

std::string describe(const at::Tensor& t) {
  std::ostringstream text;
  text << t.scalar_type() << " " << t.sizes() << " on " << t.device();
  return text.str();
}

void check_operands(const c10::OperatorHandle& op, const Name& name, const torch::jit::Stack& args) {
  const auto& formals = op.schema().arguments();
  const bool dtypes_matter = !device.promote && !mixes_dtypes(name);
  std::optional<at::Tensor> first;
  for (size_t i = 0; i < args.size(); i++) {
    visit_tensors(args[i], [&](const at::Tensor& t) {
      if (!on_device(t)) {
        TORCH_CHECK(t.device().is_cpu() && t.dim() == 0, name, ": expected all tensors to be on the same device, ",
                    device.name, ":0, but argument '", formals[i].name(), "' is ", describe(t));
        return;
      }
      if (!dtypes_matter || formals[i].is_out() || !t.is_floating_point() || t.dim() == 0) return;
      TORCH_CHECK(!first || first->scalar_type() == t.scalar_type(), name,
                  ": operands of two floating dtypes, ", describe(*first), " and ", describe(t), " (argument '",
                  formals[i].name(), "'): ", device.name, " does not promote; cast one");
      if (!first) first = t;
    });
  }
}

std::string recipe_key(const Name& name, const torch::jit::Stack& args) {
  std::ostringstream key;
  key << name;
  for (const auto& arg : args) {
    bool any = false;
    visit_tensors(arg, [&](const at::Tensor& t) {
      any = true;
      key << "|" << t.scalar_type() << t.sizes() << t.strides();
      if (!on_device(t)) key << "=" << t.item().toDouble();
    });
    if (!any && !arg.isGenerator()) key << "|" << arg;
  }
  return key.str();
}

struct Aliases {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // (device tensor, CPU alias)
  const StorageMap* instead = nullptr;

  at::Tensor to_host(const at::Tensor& t) {
    if (!on_device(t)) return t;
    pairs.emplace_back(t, host_alias(t, instead));
    return pairs.back().second;
  }
  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      std::vector<at::Tensor> out;
      for (const at::Tensor& t : value.toTensorVector()) out.push_back(to_host(t));
      return out;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> out;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
        out.push_back(t ? std::optional<at::Tensor>(to_host(*t)) : t);
      return out;
    }
    if (value.isGenerator()) return host_generator(value.toGenerator());
    if (value.isDevice() && value.toDevice().type() == device.type) return c10::Device(c10::kCPU);
    return value;
  }
  at::Tensor from_host(const at::Tensor& t) const {
    if (!t.defined()) return t;
    for (const auto& [mine, alias] : pairs)
      if (t.unsafeGetTensorImpl() == alias.unsafeGetTensorImpl()) return grown(mine, t);
    for (const auto& [mine, alias] : pairs)
      if (t.has_storage() && alias.storage().data() != nullptr && t.storage().data() == alias.storage().data())
        return view_of(mine, t);
    return to_device(t);
  }
  // an out= argument that the kernel has resized
  static at::Tensor grown(const at::Tensor& mine, const at::Tensor& result) {
    if (mine.sizes() == result.sizes()) return mine;
    auto fresh = to_device(result);
    mine.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
    mine.unsafeGetTensorImpl()->set_sizes_and_strides(fresh.sizes(), fresh.strides(), 0);
    return mine;
  }
  static at::Tensor view_of(const at::Tensor& mine, const at::Tensor& result) {
    auto out = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(mine.storage()), mine.key_set(), result.dtype());
    out.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    mark_view(out);
    return out;
  }
  c10::IValue from_host(const c10::IValue& value) const {
    if (value.isTensor()) return from_host(value.toTensor());
    if (value.isTensorList()) {
      std::vector<at::Tensor> out;
      for (const at::Tensor& t : value.toTensorVector()) out.push_back(from_host(t));
      return out;
    }
    return value;
  }
};

}  // namespace

bool is_view(const c10::OperatorHandle& op) {
  bool any_alias = false;
  for (const auto& result : op.schema().returns()) any_alias = any_alias || result.alias_info() != nullptr;
  return any_alias && !op.schema().is_mutable();
}

void note_kernel(const Name& name) {
  counters.kernels++;
  if (program_depth == 0) counters.loose_kernels++;
  std::lock_guard<std::mutex> lock(counters.by_name_mutex);
  counters.by_name[name]++;
}

void run_on_host(
    const c10::OperatorHandle& op, torch::jit::Stack& stack,
    std::vector<std::pair<at::Tensor, at::Tensor>>* aliases, const StorageMap* instead) {
  Aliases map;
  map.instead = instead;
  for (auto& value : stack) value = map.to_host(value);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  for (const auto& value : stack)  // a collective: done when it returns, on the CPU backend of its group
    if (op.schema().name().rfind("c10d::", 0) == 0 && value.isObject()) value.toCustomClass<c10d::Work>()->wait();
  if (aliases != nullptr) {
    *aliases = std::move(map.pairs);
    return;
  }
  for (auto& value : stack) value = map.from_host(value);
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Name name = name_of(op);
  const size_t num_args = op.schema().arguments().size();
  torch::jit::Stack args(stack->end() - static_cast<int64_t>(num_args), stack->end());
  check_operands(op, name, args);
  if (reads_shape(op.schema().name(), args)) {
    note_sync(counters.shape_reads, name + ", whose result shape or value the host must know,");
    flush_recipe(name.c_str());
  }
  if (!is_view(op)) note_kernel(name);
  const auto& formals = op.schema().arguments();
  for (size_t i = 0; i < num_args; i++)
    if (formals[i].alias_info() != nullptr && formals[i].alias_info()->isWrite())
      visit_tensors(args[i], [&](const at::Tensor& t) { note_write(name, t); });
  if (device.lazy && !capturing()) extend_recipe(recipe_key(name, args));
  torch::jit::drop(*stack, num_args);
  torch::jit::Stack work = args;
  run_on_host(op, work, nullptr);
  if (capturing()) record_call(op, std::move(args), work);
  for (auto& value : work) stack->push_back(std::move(value));
}

}  // namespace simdevice
