// An accelerator emulated on the CPU ("emu"), registered as PyTorch's PrivateUse1 device.
//
// Device memory: every block is a memfd mapped twice. Tensors carry the address of the mapping that nobody may touch (PROT_NONE), so
// that host code which reads device memory dies by SIGSEGV; the device's own threads use the other mapping.
// Streams: one thread each with a queue. Copies run there, late (a delay that can be set) or after a gate opens (pause/resume).
// Kernels: a third copy of every block, `ahead`, is what device memory will be when all streams have done what was put so far, taken in
// the order of the calls. Operators compute on it at once, so that the host never waits for a kernel, while their results reach device
// memory itself only when the current stream gets to it. Copies to the host read device memory itself, on their stream.
// Freed blocks: overwritten with 0xDD in the order of the stream they were allocated on and kept for reuse on that stream, unless
// record_stream named other streams: then only when these have finished, as CUDA's caching allocator does.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/resize_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/Generator.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

namespace emu {

using Clock = std::chrono::steady_clock;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;
const c10::Device kFirst(kDevice, 0);

std::atomic<double> copy_delay_s{0}, kernel_delay_s{0};
std::atomic<bool> share_generator{false};
std::atomic<uint64_t> async_copies{0}, sync_copies{0};

// Waits must not hold the GIL: a queue's thread may need it to let go of a tensor.
struct NoGil {
  PyThreadState* state = Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  ~NoGil() { if (state) PyEval_RestoreThread(state); }
};

std::atomic<int> any_paused{0};

struct Queue {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> tasks;
  uint64_t put = 0, done = 0;
  bool paused = false;

  Queue() { std::thread([this] { run(); }).detach(); }  // queues are never destroyed

  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return !tasks.empty() && !paused; });
      auto task = std::move(tasks.front());
      tasks.pop_front();
      lock.unlock();
      task();
      lock.lock();
      ++done;
      changed.notify_all();
      lock.unlock();
      task = nullptr;
      lock.lock();
    }
  }
  uint64_t add(std::function<void()> task) {
    std::lock_guard<std::mutex> lock(mutex);
    tasks.push_back(std::move(task));
    changed.notify_all();
    return ++put;
  }
  uint64_t last() { std::lock_guard<std::mutex> lock(mutex); return put; }
  bool reached(uint64_t ticket) { std::lock_guard<std::mutex> lock(mutex); return done >= ticket; }
  void wait(uint64_t ticket, bool of_host = true) {
    NoGil released;
    std::unique_lock<std::mutex> lock(mutex);
    while (!changed.wait_for(lock, std::chrono::seconds(60), [&] { return done >= ticket; }))
      TORCH_CHECK(!of_host || !any_paused, "emu: waited 60 s for a stream while one is paused");
  }
  void pause(bool yes) {
    std::lock_guard<std::mutex> lock(mutex);
    if (paused != yes) any_paused += yes ? 1 : -1;
    paused = yes;
    changed.notify_all();
  }
};

auto& queues = *new std::deque<Queue>;
auto& queues_mutex = *new std::mutex;
thread_local c10::StreamId current = 0;
thread_local bool in_kernel = false;

Queue& queue(c10::StreamId id) {
  std::lock_guard<std::mutex> lock(queues_mutex);
  if (queues.empty()) queues.emplace_back();
  TORCH_CHECK(id >= 0 && id < static_cast<c10::StreamId>(queues.size()), "emu has no stream ", id);
  return queues[id];
}
c10::StreamId new_stream() {
  queue(0);
  std::lock_guard<std::mutex> lock(queues_mutex);
  queues.emplace_back();
  return queues.size() - 1;
}
size_t stream_count() { std::lock_guard<std::mutex> lock(queues_mutex); return queues.size(); }
c10::Stream stream_of(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, kFirst, id); }

// ---- memory -----------------------------------------------------------------------------------------------------------------------

struct Block {
  char* device = nullptr;
  char* host = nullptr;
  char* ahead = nullptr;
  size_t size = 0;
  c10::StreamId home = 0;
  std::vector<std::pair<c10::StreamId, uint64_t>> uses;  // of other streams, told by record_stream
};

struct DeviceMemory final : c10::DeviceAllocator {
  std::mutex mutex;
  std::map<char*, Block> blocks;  // by device address; freed ones too
  std::multimap<std::pair<c10::StreamId, size_t>, char*> free_blocks;
  std::vector<char*> waiting;  // freed, but another stream still uses them
  c10::CachingDeviceAllocator::DeviceStats stats;

  static void release(void* address) { instance().give_back(static_cast<char*>(address)); }
  static DeviceMemory& instance() { static auto* one = new DeviceMemory; return *one; }

  void poison(const Block& block) {
    memset(block.ahead, 0xDD, block.size);
    queue(block.home).add([host = block.host, size = block.size] { memset(host, 0xDD, size); });
    free_blocks.emplace(std::make_pair(block.home, block.size), block.device);
  }
  bool unused(Block& block) {
    for (auto& [id, ticket] : block.uses) if (!queue(id).reached(ticket)) return false;
    block.uses.clear();
    return true;
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &release, kFirst};
    const size_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < waiting.size();) {
      auto& block = blocks.at(waiting[i]);
      if (!unused(block)) { ++i; continue; }
      poison(block);
      waiting.erase(waiting.begin() + i);
    }
    char* address = nullptr;
    if (auto found = free_blocks.find({current, size}); found != free_blocks.end()) {
      address = found->second;
      free_blocks.erase(found);
    } else {
      const int fd = memfd_create("emu", 0);
      TORCH_CHECK(fd >= 0 && ftruncate(fd, size) == 0, "emu: out of memory for ", bytes, " bytes");
      Block block;
      block.device = static_cast<char*>(mmap(nullptr, size, PROT_NONE, MAP_SHARED, fd, 0));
      block.host = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
      close(fd);
      TORCH_CHECK(block.device != MAP_FAILED && block.host != MAP_FAILED, "emu: out of memory for ", bytes, " bytes");
      block.size = size;
      block.home = current;
      block.ahead = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      TORCH_CHECK(block.ahead != MAP_FAILED, "emu: out of memory for ", bytes, " bytes");
      memset(block.host, 0xDD, size);
      memset(block.ahead, 0xDD, size);
      blocks[block.device] = block;
      address = block.device;
      stats.reserved_bytes[0].increase(size);
    }
    stats.allocated_bytes[0].increase(size);
    return {address, address, &release, kFirst};
  }
  void give_back(char* address) {
    if (!address) return;
    std::lock_guard<std::mutex> lock(mutex);
    auto& block = blocks.at(address);
    stats.allocated_bytes[0].decrease(block.size);
    for (auto& use : block.uses) use.second = queue(use.first).last();
    if (unused(block)) poison(block); else waiting.push_back(address);
  }
  Block* find(const void* address) {
    auto next = blocks.upper_bound(static_cast<char*>(const_cast<void*>(address)));
    if (next == blocks.begin()) return nullptr;
    auto& block = std::prev(next)->second;
    return address < block.device + block.size ? &block : nullptr;
  }
  // Where the device's own threads find what lies at a device address.
  char* inside(const void* address, bool ahead) {
    std::lock_guard<std::mutex> lock(mutex);
    auto* block = find(address);
    TORCH_CHECK(block, "emu: ", address, " is no device memory");
    return (ahead ? block->ahead : block->host) + (static_cast<const char*>(address) - block->device);
  }
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto* block = find(data.get()); block && block->home != stream.id()) block->uses.emplace_back(stream.id(), 0);
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    auto& self = instance();
    memcpy(self.inside(to, true), self.inside(from, true), count);
    queue(current).add([to = self.inside(to, false), from = self.inside(from, false), count] { memcpy(to, from, count); });
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    std::lock_guard<std::mutex> lock(mutex);
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override { stats.allocated_bytes[0].reset_accumulated(); }
  void resetPeakStats(c10::DeviceIndex) override { stats.allocated_bytes[0].reset_peak(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    std::lock_guard<std::mutex> lock(mutex);
    const size_t total = size_t(64) << 30;
    return {total - stats.allocated_bytes[0].current, total};
  }
};

struct PinnedMemory final : at::HostAllocator {
  std::mutex mutex;
  std::map<char*, size_t> blocks, registered;  // allocated here; the caller's own memory, as cudaHostRegister pins it
  size_t live = 0, peak = 0, allocations = 0;

  static PinnedMemory& instance() { static auto* one = new PinnedMemory; return *one; }
  static void release(void* address) {
    auto& self = instance();
    std::lock_guard<std::mutex> lock(self.mutex);
    auto found = self.blocks.find(static_cast<char*>(address));
    if (found == self.blocks.end()) return;
    self.live -= found->second;
    munmap(address, found->second);  // a later use of it dies by SIGSEGV; copies under way keep their tensor alive
    self.blocks.erase(found);
  }
  at::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &release, at::Device(at::kCPU)};
    const size_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
    auto* address = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    TORCH_CHECK(address != MAP_FAILED, "emu: out of pinned memory for ", bytes, " bytes");
    std::lock_guard<std::mutex> lock(mutex);
    blocks[address] = size;
    live += size;
    ++allocations;
    peak = std::max(peak, live);
    return {address, address, &release, at::Device(at::kCPU)};
  }
  bool holds(const void* address) {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto* known : {&blocks, &registered}) {
      auto next = known->upper_bound(static_cast<char*>(const_cast<void*>(address)));
      if (next != known->begin() && address < std::prev(next)->first + std::prev(next)->second) return true;
    }
    return false;
  }
  // As cudaMemcpyAsync: "invalid argument" for memory that is pinned in part, or in two pieces.
  void check_whole(const char* begin, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto& [address, size] : registered) {
      const bool first = begin >= address && begin < address + size, last = begin + bytes > address && begin + bytes <= address + size;
      TORCH_CHECK(first == last, "emu: invalid argument: a copy crosses the edge of registered memory");
    }
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { memcpy(to, from, count); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

// ---- streams and events -----------------------------------------------------------------------------------------------------------

struct Event {
  c10::StreamId stream;
  uint64_t ticket;
  std::shared_ptr<Clock::time_point> at;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kFirst; }
  c10::Device getDevice() const override { return kFirst; }
  void setDevice(c10::Device d) const override { TORCH_CHECK(d.index() <= 0, "emu has one device"); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream_of(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream_of(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream_of(new_stream()); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream_of(new_stream()); }
  c10::Stream exchangeStream(c10::Stream s) const override { return stream_of(std::exchange(current, s.id())); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    auto at = std::make_shared<Clock::time_point>();
    const auto ticket = queue(stream.id()).add([at] { *at = Clock::now(); });
    delete static_cast<Event*>(*event);
    *event = new Event{stream.id(), ticket, at};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (!event) return;
    const auto [of, ticket, at] = *static_cast<Event*>(event);
    queue(stream.id()).add([of = of, ticket = ticket] { queue(of).wait(ticket, false); });
  }
  bool queryEvent(void* event) const override {
    auto* e = static_cast<Event*>(event);
    return !e || queue(e->stream).reached(e->ticket);
  }
  void synchronizeEvent(void* event) const override {
    if (auto* e = static_cast<Event*>(event)) queue(e->stream).wait(e->ticket);
  }
  bool queryStream(const c10::Stream& s) const override { auto& q = queue(s.id()); return q.reached(q.last()); }
  void synchronizeStream(const c10::Stream& s) const override { auto& q = queue(s.id()); q.wait(q.last()); }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    for (size_t i = 0; i < stream_count(); ++i) synchronizeStream(stream_of(i));
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& s) const override {
    DeviceMemory::instance().recordStream(data, s);
  }
  double elapsedTime(void* a, void* b, const c10::DeviceIndex) const override {
    return std::chrono::duration<double, std::milli>(*static_cast<Event*>(b)->at - *static_cast<Event*>(a)->at).count();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- random numbers ---------------------------------------------------------------------------------------------------------------

// The device's own stream of random numbers: a CPU generator behind the device's name.
struct Generator final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  Generator() : GeneratorImpl(kFirst, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "emu generators have no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "emu generators have no offset"); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator;
    copy->inner = inner.clone();
    return copy;
  }
};
const at::Generator& default_generator() {
  static auto* one = new at::Generator(at::make_generator<Generator>());
  return *one;
}

// ---- operators --------------------------------------------------------------------------------------------------------------------

at::Tensor inside(const at::Tensor& t, bool ahead = false) {
  return at::from_blob(DeviceMemory::instance().inside(t.data_ptr(), ahead), t.sizes(), t.strides(), t.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (!to.numel()) return to;
  at::AutoDispatchBelowADInplaceOrView below;
  const bool down = to.is_cpu(), up = from.is_cpu();
  const auto& host = down ? to : from;
  const bool pinned = (down || up) && PinnedMemory::instance().holds(host.data_ptr());
  if (down && in_kernel) {
    to.alias().copy_(inside(from, true));
    return to;
  }
  if ((down || up) && host.is_contiguous()) PinnedMemory::instance().check_whole(static_cast<char*>(host.data_ptr()), host.nbytes());
  // What the host holds stays alive as long as the copy; device memory does not, as on a real device.
  at::Tensor source = up ? (pinned && non_blocking ? from.alias() : from.clone()) : inside(from);
  at::Tensor target = down ? to.alias() : inside(to);
  if (!down) inside(to, true).copy_(up ? source : inside(from, true));
  const bool wait = (down && !(non_blocking && pinned && to.is_contiguous())) || (up && !non_blocking && !in_kernel);
  const double delay_s = in_kernel ? kernel_delay_s : copy_delay_s;
  auto& line = queue(current);
  const auto ticket = line.add([source, target, delay_s]() mutable {
    if (delay_s > 0) std::this_thread::sleep_for(std::chrono::duration<double>(delay_s));
    at::AutoDispatchBelowADInplaceOrView below;
    target.copy_(source);
  });
  if (!in_kernel) ++(wait ? sync_copies : async_copies);
  if (wait) line.wait(ticket);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& t) { return t.to(at::kCPU).item(); }

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device>,
                 std::optional<bool> pin, std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "only dense CPU tensors can be pinned");
  return at::detail::empty_generic(size, &DeviceMemory::instance(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &DeviceMemory::instance(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}
void resize_bytes(const c10::Storage& storage, size_t size) {
  auto fresh = DeviceMemory::instance().allocate(size);
  if (const auto both = std::min(size, storage.nbytes()); both && storage.data())
    DeviceMemory::instance().copy_data(fresh.get(), storage.data(), both);
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.set_nbytes(size);
}
const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  if (format.value_or(at::MemoryFormat::Contiguous) != at::MemoryFormat::Preserve)
    impl->empty_tensor_restride(format.value_or(at::MemoryFormat::Contiguous));
  const auto bytes = at::detail::computeStorageNbytes(impl->sizes(), impl->strides(), self.dtype().itemsize(), impl->storage_offset());
  if (bytes > self.storage().nbytes()) resize_bytes(self.storage(), bytes);
  return self;
}
at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(self, size, stride, offset);
}
at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }
at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) { return at::native::set_tensor_(self, source); }
at::Tensor& set_storage(at::Tensor& self, at::Storage source) { return at::native::set_(self, source); }
at::Tensor& set_part(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::cpu::set__symint(self, storage, offset, size, stride);
}
void record_stream(at::Tensor& self, c10::Stream stream) {
  DeviceMemory::instance().recordStream(self.storage().data_ptr(), stream);
}

// For integers only CUDA has it, and model code takes "not the CPU" for CUDA.
at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  return at::histc(self.cpu().to(at::kDouble), bins, low, high).to(self.options());
}

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  bool named = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].name() != "generator") continue;
    named = true;
    if (share_generator) continue;
    auto& value = (*stack)[stack->size() - arguments.size() + i];
    const auto given = value.isNone() ? default_generator() : value.toGenerator();
    if (given.device().type() == kDevice) value = static_cast<Generator*>(given.unsafeGetGeneratorImpl())->inner;
  }
  struct Inside {
    bool before = std::exchange(in_kernel, true);
    ~Inside() { in_kernel = before; }
  } now;
  const bool draws = !named && !share_generator && op.hasTag(at::Tag::nondeterministic_seeded);
  if (!draws) return at::native::cpu_fallback(op, stack);
  // An operator such as native_dropout, that takes no generator, draws from the CPU's: which is made the device's for that time.
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  auto host = at::detail::getDefaultCPUGenerator();
  auto& device = static_cast<Generator*>(default_generator().unsafeGetGeneratorImpl())->inner;
  const auto before = host.get_state();
  host.set_state(device.get_state());
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    host.set_state(before);
    throw;
  }
  device.set_state(host.get_state());
  host.set_state(before);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("histc", histc);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("record_stream", record_stream);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>()); }

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex d) const override { TORCH_CHECK(d <= 0, "emu has one device"); }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &PinnedMemory::instance(); }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::instance().holds(data); }
  at::Device getDeviceFromPtr(void*) const override { return kFirst; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    resize_bytes(storage, size);
  }
};

struct Registered {
  Registered() {
    c10::SetAllocator(kDevice, &DeviceMemory::instance());
    at::setHostAllocator(kDevice, &PinnedMemory::instance());
    at::RegisterPrivateUse1HooksInterface(new Hooks);
  }
} registered;

}  // namespace emu

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace emu;
  m.def("default_generator", [] { return py::reinterpret_steal<py::object>(THPGenerator_initDefaultGenerator(default_generator())); });
  m.def("pause", [](int64_t id, bool yes) { queue(id).pause(yes); });
  m.def("set_delays", [](double copy_s, double kernel_s) { copy_delay_s = copy_s; kernel_delay_s = kernel_s; });
  m.def("share_generator", [](bool yes) { share_generator = yes; });
  m.def("host_register", [](uintptr_t address, size_t bytes) {
    auto& p = PinnedMemory::instance();
    std::lock_guard<std::mutex> lock(p.mutex);
    p.registered[reinterpret_cast<char*>(address)] = bytes;
  });
  m.def("host_unregister", [](uintptr_t address) {
    auto& p = PinnedMemory::instance();
    std::lock_guard<std::mutex> lock(p.mutex);
    TORCH_CHECK(p.registered.erase(reinterpret_cast<char*>(address)), "emu: this memory was not registered");
  });
  m.def("copies", [] { return std::make_pair(async_copies.load(), sync_copies.load()); });
  m.def("pinned", [] {
    auto& p = PinnedMemory::instance();
    std::lock_guard<std::mutex> lock(p.mutex);
    return std::make_tuple(p.live, p.peak, p.allocations);
  });
}
