// PyTorch's CPU allocator for large buffers, whose pages go from a buffer that was freed to the next, whatever its
// size.
//
// A step frees buffers of one set of sizes and takes those of another: activations, the head's, gradients. A heap keeps
// the holes that do not fit; mapping each buffer anew costs a page fault and zeros for every page. Here a buffer of a
// new size is put together from the pages of freed ones, which `mremap` moves to its addresses without copying. So no
// more is resident than was ever in use at once, and a steady step takes no page fault. CUDA's "expandable segments" do
// the like.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

// What is moved at a time: what one entry of the page directory covers on x86-64, which then moves as one. All mappings
// begin and end at multiples of it, so no move crosses from one mapping into the next, which Linux before 6.17 refuses.
constexpr size_t kUnit = size_t{2} << 20;
// Smaller buffers are malloc's, as they would fill less than most of a unit.
constexpr size_t kLarge = kUnit / 4 * 3;
// From here on a buffer's last unit may be resident whole, however little of it is in use.
constexpr size_t kHuge = kUnit * 4;
// Larger ones, which no machine has, too: their sizes could not be rounded up.
constexpr size_t kMost = SIZE_MAX / 2;

struct Range {
  char* data = nullptr;
  size_t bytes = 0;
};

struct Lent {
  size_t bytes;
  size_t asked;
};

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }

  bool release(void* data);
  size_t live_bytes();

  std::mutex mutex;

 private:
  using Freed = std::list<Range>;  // the longest ago first

  Range take(size_t bytes);
  Range assemble(size_t bytes);
  void drain();
  void index(Freed::iterator range) { of_size_[range->bytes].push_back(range); }
  void forget(Freed::iterator range);

  size_t live_bytes_ = 0;
  std::unordered_map<void*, Lent> live_;
  Freed freed_;
  std::unordered_map<size_t, std::vector<Freed::iterator>> of_size_;
};

// Never destroyed: tensors that other libraries hold are freed after this one's static objects.
Pool& pool() {
  static Pool* only = new Pool;
  return *only;
}

void release(void* data) {
  if (!pool().release(data)) c10::GetDefaultCPUAllocator()->raw_deleter()(data);
}

// Addresses for `bytes`, at a multiple of the unit, with no memory behind them; null where there are none.
char* reserve(size_t bytes) {
  void* wide = mmap(nullptr, bytes + kUnit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (wide == MAP_FAILED) return nullptr;
  char* first = static_cast<char*>(wide);
  size_t before = (kUnit - reinterpret_cast<uintptr_t>(wide) % kUnit) % kUnit;
  if (before) munmap(first, before);
  munmap(first + before + bytes, kUnit - before);
  return first + before;
}

void Pool::forget(Freed::iterator range) {
  auto& same = of_size_[range->bytes];
  same.erase(std::find(same.begin(), same.end(), range));
}

// The most recently freed range of the size, which may still be in a cache, or one put together; none where the system
// refuses.
Range Pool::take(size_t bytes) {
  auto& same = of_size_[bytes];
  if (same.empty()) {
    Range range = assemble(bytes);
    if (range.data || freed_.empty()) return range;
    drain();  // its mappings may be what there are too many of
    return assemble(bytes);
  }
  auto latest = same.back();
  same.pop_back();
  Range range = *latest;
  freed_.erase(latest);
  return range;
}

// From its end on, as what it is made of is taken from there too: pages that stood beside each other still do, and stay
// one mapping of the system's.
Range Pool::assemble(size_t bytes) {
  Range range{reserve(bytes), bytes};
  if (!range.data) return {};
  char* filled = range.data + bytes;
  bool refused = false;
  while (!refused && filled > range.data && !freed_.empty()) {
    auto oldest = freed_.begin();
    forget(oldest);
    while (filled > range.data && oldest->bytes) {
      char* last = oldest->data + oldest->bytes - kUnit;
      // As where the process has as many mappings as it may.
      refused = mremap(last, kUnit, kUnit, MREMAP_MAYMOVE | MREMAP_FIXED, filled - kUnit) == MAP_FAILED;
      if (refused) break;
      oldest->bytes -= kUnit;
      filled -= kUnit;
    }
    if (oldest->bytes) {
      index(oldest);
    } else {
      freed_.erase(oldest);
    }
  }
  size_t rest = filled - range.data;
  if (!rest) return range;
  if (!refused && !mprotect(range.data, rest, PROT_READ | PROT_WRITE)) {
    // Units as pages of their own, where the system grants them: fewer addresses to translate.
    if (rest >= kHuge) madvise(range.data, rest, MADV_HUGEPAGE);
    return range;
  }
  // A refused move may have unmapped its addresses, and another thread have them by now.
  if (refused) rest -= kUnit;
  if (rest) munmap(range.data, rest);
  if (filled < range.data + bytes)
    index(freed_.insert(freed_.end(), Range{filled, static_cast<size_t>(range.data + bytes - filled)}));
  return {};
}

// Give the system back what is freed.
void Pool::drain() {
  for (const Range& range : freed_) munmap(range.data, range.bytes);
  freed_.clear();
  of_size_.clear();
}

c10::DataPtr Pool::allocate(size_t n) {
  c10::Allocator* otherwise = c10::GetDefaultCPUAllocator();
  if (n < kLarge || n > kMost) return otherwise->allocate(n);
  Range range;
  {
    std::lock_guard<std::mutex> guard(mutex);
    range = take((n + kUnit - 1) / kUnit * kUnit);
    if (range.data) {
      live_.emplace(range.data, Lent{range.bytes, n});
      live_bytes_ += n;
    }
  }
  if (!range.data) return otherwise->allocate(n);  // which says so where there is no memory
  c10::profiledCPUMemoryReporter().New(range.data, n);
  return {range.data, range.data, &::release, c10::Device(c10::DeviceType::CPU)};
}

c10::DeleterFnPtr Pool::raw_deleter() const { return &::release; }

// Whether the buffer was of this pool.
bool Pool::release(void* data) {
  {
    std::lock_guard<std::mutex> guard(mutex);
    auto found = live_.find(data);
    if (found == live_.end()) return false;
  }
  c10::profiledCPUMemoryReporter().Delete(data);  // before another thread can be given the same addresses
  std::lock_guard<std::mutex> guard(mutex);
  auto found = live_.find(data);
  live_bytes_ -= found->second.asked;
  index(freed_.insert(freed_.end(), Range{static_cast<char*>(data), found->second.bytes}));
  live_.erase(found);
  return true;
}

size_t Pool::live_bytes() {
  std::lock_guard<std::mutex> guard(mutex);
  return live_bytes_;
}

}  // namespace

extern "C" {

// Have PyTorch take large CPU buffers from here, from now on.
void tilewright_install() {
  // A child forked while another thread allocates must not find the lock taken.
  pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
  c10::SetCPUAllocator(&pool(), 1);
}

// Bytes in use, as they were asked for.
size_t tilewright_live_bytes() { return pool().live_bytes(); }
}
