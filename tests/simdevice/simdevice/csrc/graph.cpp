// What happens later: captured graphs, lazy recipes and asynchronous copies to the host.
//
// A graph is the list of calls made between begin and end, on the tensors they were made with; replay runs them
// again in order and writes results into the recorded results' memory, so addresses and Python scalars are baked
// as on the real devices. A graph owns its intermediates until it is freed. Memory that was fresh in the capture
// is poisoned again on replay. A recipe is the list of operators, shapes, dtypes and scalars between two marks.
// An asynchronous copy shows poison on the host until something synchronizes.
#include "kernels.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <cstring>
#include <deque>
#include <memory>
#include <unordered_set>

namespace simdevice {
namespace {

struct Call {
  std::optional<c10::OperatorHandle> op;  // none: a copy (args = from, to) or fresh memory (args = the tensor)
  torch::jit::Stack args, outs;
};
using Graph = std::vector<Call>;

std::mutex graphs_mutex;
std::map<int64_t, std::shared_ptr<Graph>> graphs;
int64_t next_graph = 1;
thread_local std::shared_ptr<Graph> open_graph;
thread_local int64_t open_id = 0;

std::mutex recipes_mutex;
std::unordered_set<std::string> recipes;
std::string recipe;

struct AsyncCopy {
  int64_t at;
  at::Tensor snapshot, to;
};
std::mutex async_mutex;
std::deque<AsyncCopy> async_copies;
int64_t async_clock = 0;

void store(const c10::IValue& recorded, const c10::IValue& fresh, const StorageMap& instead) {
  if (recorded.isTensor()) {
    const auto& to = recorded.toTensor();
    const auto& from = fresh.toTensor();
    if (!on_device(to) || !from.defined()) return;
    auto alias = host_alias(to, &instead);
    if (alias.data_ptr() != from.data_ptr()) alias.copy_(from);
  } else if (recorded.isTensorList()) {
    const auto to = recorded.toTensorVector();
    const auto from = fresh.toTensorVector();
    for (size_t i = 0; i < to.size(); i++) store(to[i], from[i], instead);
  }
}

void replay_call(const Call& call, const StorageMap& instead) {
  if (!call.op) {
    const auto& first = call.args[0].toTensor();
    if (call.args.size() == 1) return poison(first.storage().mutable_data(), first.storage().nbytes());
    host_alias(call.args[1].toTensor(), &instead).copy_(host_alias(first, &instead));
    return;
  }
  torch::jit::Stack work = call.args;
  std::vector<std::pair<at::Tensor, at::Tensor>> aliases;
  run_on_host(*call.op, work, &aliases, &instead);
  for (size_t i = 0; i < work.size(); i++) store(call.outs[i], work[i], instead);
}

}  // namespace

bool capturing() { return open_graph != nullptr; }

void record_fresh(const at::Tensor& t) {
  if (t.storage().nbytes() > 0) open_graph->push_back({std::nullopt, {t}, {}});
}
void record_copy(const at::Tensor& from, const at::Tensor& to) { open_graph->push_back({std::nullopt, {from, to}, {}}); }
void record_call(const c10::OperatorHandle& op, torch::jit::Stack args, torch::jit::Stack outs) {
  if (!is_view(op)) open_graph->push_back({op, std::move(args), std::move(outs)});
}

int64_t begin_capture() {
  TORCH_CHECK(!capturing(), device.name, ": a graph capture is already open in this thread");
  if (device.strict) refuse("new-program", "a graph was captured after strict() was called");
  open_graph = std::make_shared<Graph>();
  std::lock_guard<std::mutex> lock(graphs_mutex);
  return open_id = next_graph++;
}
int64_t end_capture(bool keep) {
  TORCH_CHECK(capturing(), device.name, ": no graph capture is open in this thread");
  auto graph = std::move(open_graph);
  open_graph = nullptr;
  const auto num_calls = static_cast<int64_t>(graph->size());
  if (keep) {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    graphs[open_id] = std::move(graph);
    counters.captures++;
  }
  return num_calls;
}
void replay(int64_t id, const StorageMap& instead) {
  std::shared_ptr<Graph> graph;
  {
    std::lock_guard<std::mutex> lock(graphs_mutex);
    const auto found = graphs.find(id);
    TORCH_CHECK(found != graphs.end(), device.name, ": graph ", id, " was never captured or is freed");
    graph = found->second;
  }
  TORCH_CHECK(!capturing(), device.name, ": a graph can't be replayed inside a capture");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (const auto& call : *graph) replay_call(call, instead);
  counters.replays++;
}
void free_graph(int64_t id) {
  std::shared_ptr<Graph> graph;  // its tensors die outside the lock
  std::lock_guard<std::mutex> lock(graphs_mutex);
  const auto found = graphs.find(id);
  if (found == graphs.end()) return;
  graph = std::move(found->second);
  graphs.erase(found);
}

void extend_recipe(const std::string& call) {
  std::lock_guard<std::mutex> lock(recipes_mutex);
  recipe += call + "\n";
}
void flush_recipe(const char* why) {
  if (!device.lazy) return;
  std::lock_guard<std::mutex> lock(recipes_mutex);
  if (recipe.empty()) return;
  std::string done;
  done.swap(recipe);
  if (recipes.count(done) > 0) return;
  if (device.strict)
    refuse("new-program", std::string("a new recipe was compiled after strict() was called (at ") + why + "): " + done.substr(0, 400));
  recipes.insert(std::move(done));
  counters.recipes++;
}

void enqueue_async_copy(const at::Tensor& from, const at::Tensor& to) {
  std::lock_guard<std::mutex> lock(async_mutex);
  async_copies.push_back({++async_clock, from.clone(), to});
  if (to.is_contiguous() && to.numel() > 0) std::memset(to.data_ptr(), 0xFF, to.nbytes());
}
int64_t async_copy_clock() {
  std::lock_guard<std::mutex> lock(async_mutex);
  return async_clock;
}
void complete_async_copies(int64_t up_to) {
  std::deque<AsyncCopy> ready;
  {
    std::lock_guard<std::mutex> lock(async_mutex);
    while (!async_copies.empty() && async_copies.front().at <= up_to) {
      ready.push_back(std::move(async_copies.front()));
      async_copies.pop_front();
    }
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (auto& copy : ready) copy.to.copy_(copy.snapshot);
}

}  // namespace simdevice
