// What the pretend device has besides operations: memory that is counted, random numbers, streams and events.

#pragma once

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

namespace at::detail {  // of ATen/CPUGeneratorImpl.h
TORCH_API const Generator& getDefaultCPUGenerator();
TORCH_API Generator createCPUGenerator(uint64_t seed_val);
}  // namespace at::detail

using namespace at;
using c10::DispatchKey;

namespace {

constexpr auto kHere = DeviceType::PrivateUse1;
const c10::Device kDevice(kHere, 0);

// ---- What is told to Python --------------------------------------------------------------------------------------

// `kind` of an event, its operation, its bytes, and whether the host waits for it; Python writes its line to `line`.
using Listener = void (*)(const char* kind, const char* operation, int64_t bytes, int waits, char* line, int size);
Listener listener = nullptr;

std::string tell(const char* kind, const std::string& operation, int64_t bytes, bool waits) {
  char line[512] = "";
  if (listener) listener(kind, operation.c_str(), bytes, waits, line, sizeof(line));
  return line;
}

// ---- Memory ------------------------------------------------------------------------------------------------------

std::mutex lock;
std::map<std::string, int64_t> operations;  // how often each ran
std::atomic<int64_t> current{0}, peak{0}, allocations{0}, limit{0};
std::set<std::pair<const char*, const char*>> pinned;  // [begin, end) of page-locked memory
thread_local int inside = 0;                           // an operation of the device is running on the CPU

void count(int64_t bytes) {
  int64_t now = current + bytes;
  if (limit > 0 && now > limit) {
    auto line = tell("refused", "allocate", bytes, false);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "pretend device out of memory: ", bytes, " bytes beside ", current.load(),
                     " of ", limit.load(), line.empty() ? "" : " at ", line);
  }
  current = now;
  if (now > peak) peak = now;
  allocations++;
}

struct Block {  // behind the data pointer of a storage of this device
  int64_t bytes;
  c10::DataPtr memory;
  c10::Storage cpu;  // alternatively, what a kernel allocated
};
void free_block(void* context) {
  auto block = static_cast<Block*>(context);
  current -= block->bytes;
  delete block;
}
c10::DataPtr device_pointer(void* memory, Block* block) { return {memory, block, &free_block, kDevice}; }

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, kDevice};
    count(static_cast<int64_t>(bytes));
    auto memory = c10::GetAllocator(kCPU)->allocate(bytes);
    auto address = memory.get();
    return device_pointer(address, new Block{static_cast<int64_t>(bytes), std::move(memory), {}});
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* each : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      auto& all = (*each)[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
      all.current = current, all.peak = peak;
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { peak = current.load(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    size_t total = limit > 0 ? limit.load() : int64_t{1} << 34;
    return {total - current, total};
  }
};
DeviceMemory device_memory;

void free_pinned(void* address) {
  std::lock_guard<std::mutex> held(lock);
  auto found = pinned.lower_bound({static_cast<const char*>(address), nullptr});
  if (found != pinned.end()) pinned.erase(found);
  std::free(address);
}
struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, kCPU};
    auto address = static_cast<char*>(std::malloc(bytes));
    std::lock_guard<std::mutex> held(lock);
    pinned.insert({address, address + bytes});
    return {address, address, &free_pinned, kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;
bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> held(lock);
  auto address = static_cast<const char*>(data);
  auto after = pinned.upper_bound({address, reinterpret_cast<const char*>(UINTPTR_MAX)});
  return after != pinned.begin() && address < std::prev(after)->second;
}

// ---- Random numbers ----------------------------------------------------------------------------------------------

struct DeviceGenerator final : c10::GeneratorImpl {  // of its own, though it draws what the CPU draws from a seed
  Generator cpu;
  explicit DeviceGenerator(Generator g)
      : GeneratorImpl(kDevice, c10::DispatchKeySet(DispatchKey::PrivateUse1)), cpu(std::move(g)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "no offsets"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "no offsets"); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.unsafeGetGeneratorImpl()->seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(cpu.clone()); }
};
Generator new_generator() { return make_generator<DeviceGenerator>(at::detail::createCPUGenerator(c10::default_rng_seed_val)); }
const Generator& default_generator() {
  static Generator generator = new_generator();
  return generator;
}
struct DrawsHere {  // draws from the CPU's default generator come from the device's while this lives
  c10::GeneratorImpl* cpu = at::detail::getDefaultCPUGenerator().unsafeGetGeneratorImpl();
  c10::GeneratorImpl* here = default_generator().unsafeGetGeneratorImpl();
  c10::intrusive_ptr<c10::TensorImpl> before = cpu->get_state();
  DrawsHere() { cpu->set_state(*here->get_state()); }
  ~DrawsHere() {
    here->set_state(*cpu->get_state());
    cpu->set_state(*before);
  }
};

// ---- Streams and events: what is queued is done at once ------------------------------------------------------------

thread_local int64_t stream = 0;
std::atomic<int64_t> streams{0};
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream numbered(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }
  c10::DeviceType type() const override { return kHere; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return numbered(stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return numbered(0); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return numbered(++streams); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    auto before = getStream(kDevice);
    stream = next.id();
    return before;
  }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { tell("wait", "stream", 0, true); }
  void synchronizeEvent(void*) const override { tell("wait", "event", 0, true); }
  void synchronizeDevice(const c10::DeviceIndex) const override { tell("wait", "device", 0, true); }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
};

std::atomic<bool> available{false}, asks_for_default{false};
struct Hooks final : PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return available; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return available ? 1 : 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
  Generator getNewGenerator(c10::DeviceIndex) const override {
    return asks_for_default.exchange(false) ? default_generator() : new_generator();
  }
  const Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = device_memory.allocate(bytes);
    if (bytes && storage.nbytes()) std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
