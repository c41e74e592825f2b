// The directory of a slot pool on the device: which wanted neuron gets which slot, and who
// leaves for it. One block decides what m2jax/cache/residency.py does, to the last victim.
#include "products.cuh"

namespace m2jax {

using Bits = uint32_t;

constexpr int kThreads = 1024, kWordBits = 32;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
// What a block has without asking, less what it holds beside its sets.
constexpr size_t kMostShared = (48 << 10) - (6 << 10);

// slot_of: by neuron, -1 = none. neuron_in: by slot. priority: by neuron, the lowest goes
// first. counts: slots that are taken, wanted sets so far.
struct Directory {
  int32_t *slot_of, *neuron_in, *priority, *counts;
  int neurons, slots;
};

__device__ inline bool has(const Bits* set, int i) {
  return set[i / kWordBits] >> i % kWordBits & 1;
}

__device__ inline void add(Bits* set, int i) {
  atomicOr(set + i / kWordBits, Bits(1) << i % kWordBits);
}

// The sum of the values of the threads before this one, and of all.
__device__ int sum_before(const int value, int* sums, int& total) {
  const int self = threadIdx.x;
  sums[self] = value;
  __syncthreads();
  for (int reach = 1; reach < kThreads; reach *= 2) {
    const int more = self >= reach ? sums[self - reach] : 0;
    __syncthreads();
    sums[self] += more;
    __syncthreads();
  }
  total = sums[kThreads - 1];
  const int before = sums[self] - value;
  __syncthreads();
  return before;
}

// Members of a set in the words before each.
__device__ void count_before(const Bits* set, int words, int* before, int* sums) {
  const int each = divide_up(words, kThreads);
  const int begin = min(int(threadIdx.x) * each, words), end = min(begin + each, words);
  int own = 0, total;
  for (int i = begin; i < end; ++i) own += __popc(set[i]);
  int sum = sum_before(own, sums, total);
  for (int i = begin; i < end; ++i) {
    before[i] = sum;
    sum += __popc(set[i]);
  }
  __syncthreads();
}

// How many members are smaller than i.
__device__ inline int place_in(const Bits* set, const int* before, int i) {
  const Bits smaller = (Bits(1) << i % kWordBits) - 1;
  return before[i / kWordBits] + __popc(set[i / kWordBits] & smaller);
}

// Words of shared memory that sets of neurons and slots take, with what stands before.
struct Sets {
  Bits *kept, *chosen, *ties, *newcomers;
  int *slots_before, *neurons_before;
  int slot_words, neuron_words;

  __host__ __device__ Sets(Bits* memory, int slots, int neurons)
      : slot_words(divide_up(slots, kWordBits)),
        neuron_words(divide_up(neurons, kWordBits)) {
    kept = memory;
    chosen = kept + slot_words;
    ties = chosen + slot_words;
    newcomers = ties + slot_words;
    slots_before = reinterpret_cast<int*>(newcomers + neuron_words);
    neurons_before = slots_before + slot_words;
  }

  int words() const { return 4 * slot_words + 2 * neuron_words; }
};

// Of the slots below `held` that are not kept, the `count` whose neurons have the lowest
// priority; of equal ones the lowest slots.
__device__ void choose(const Directory& pool, const Sets& sets, int held, int count,
                       int* sums) {
  __shared__ int bins[kDigits];
  __shared__ int found[2];
  const int self = threadIdx.x;
  uint32_t last = 0, known = 0;
  // The priority of the last one, digit by digit; `count` becomes how many have just it.
  for (int shift = kWordBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    if (self < kDigits) bins[self] = 0;
    __syncthreads();
    for (int slot = self; slot < held; slot += kThreads) {
      const uint32_t priority = pool.priority[pool.neuron_in[slot]];
      if (!has(sets.kept, slot) && (priority & known) == last)
        atomicAdd(bins + (priority >> shift) % kDigits, 1);
    }
    __syncthreads();
    const int own = self < kDigits ? bins[self] : 0;
    int total;
    const int smaller = sum_before(own, sums, total);
    if (smaller < count && count <= smaller + own) {
      found[0] = self;
      found[1] = smaller;
    }
    __syncthreads();
    last |= uint32_t(found[0]) << shift;
    known |= uint32_t(kDigits - 1) << shift;
    count -= found[1];
    __syncthreads();
  }
  for (int slot = self; slot < held; slot += kThreads) {
    const uint32_t priority = pool.priority[pool.neuron_in[slot]];
    if (has(sets.kept, slot) || priority > last) continue;
    add(priority < last ? sets.chosen : sets.ties, slot);
  }
  __syncthreads();
  count_before(sets.ties, sets.slot_words, sets.slots_before, sums);
  for (int slot = self; slot < held; slot += kThreads)
    if (has(sets.ties, slot) && place_in(sets.ties, sets.slots_before, slot) < count)
      add(sets.chosen, slot);
}

// at: the slot of each wanted neuron. loads: its id if it must be loaded there, else -1.
// places: where the newcomers go, in the order of their ids. loaded: how many.
__global__ void __launch_bounds__(kThreads)
    give_slots(const int32_t* ids, const int wanted, const bool by_count, Directory pool,
               int32_t* at, int32_t* loads, int32_t* places, int32_t* loaded) {
  extern __shared__ Bits memory[];
  __shared__ int sums[kThreads];
  const Sets sets(memory, pool.slots, pool.neurons);
  const int self = threadIdx.x;
  for (int i = self; i < 3 * sets.slot_words + sets.neuron_words; i += kThreads)
    memory[i] = 0;
  const int held = pool.counts[0], step = pool.counts[1] + 1;
  __syncthreads();
  int missing = 0, count;
  for (int k = self; k < wanted; k += kThreads) {
    const int id = ids[k];
    if (id < 0 || id >= pool.neurons) continue;
    const int slot = pool.slot_of[id];
    missing += slot < 0;
    slot < 0 ? add(sets.newcomers, id) : add(sets.kept, slot);
  }
  sum_before(missing, sums, count);
  const int free = min(count, pool.slots - held), leaving = count - free;
  if (pool.slots == wanted) {
    for (int slot = self; slot < held; slot += kThreads)
      if (!has(sets.kept, slot)) add(sets.chosen, slot);
  } else if (leaving > 0) {
    choose(pool, sets, held, leaving, sums);
  }
  __syncthreads();
  count_before(sets.chosen, sets.slot_words, sets.slots_before, sums);
  count_before(sets.newcomers, sets.neuron_words, sets.neurons_before, sums);
  for (int i = self; i < free; i += kThreads) places[i] = held + i;
  for (int slot = self; slot < held; slot += kThreads) {
    if (!has(sets.chosen, slot)) continue;
    pool.slot_of[pool.neuron_in[slot]] = -1;
    places[free + place_in(sets.chosen, sets.slots_before, slot)] = slot;
  }
  __syncthreads();
  for (int k = self; k < wanted; k += kThreads) {
    const int id = ids[k];
    at[k] = loads[k] = -1;
    if (id < 0 || id >= pool.neurons) continue;
    int slot = pool.slot_of[id];
    if (slot < 0) {
      slot = places[place_in(sets.newcomers, sets.neurons_before, id)];
      loads[k] = id;
      pool.slot_of[id] = slot;
      pool.neuron_in[slot] = id;
    }
    at[k] = slot;
    pool.priority[id] = by_count ? pool.priority[id] + 1 : step;
  }
  if (self) return;
  pool.counts[0] = held + free;
  pool.counts[1] = step;
  *loaded = count;
}

// The directory is the first four results' own memory.
ffi::Error slots(cudaStream_t stream, Ids slot_of, Ids neuron_in, Ids priority,
                 Ids counts, Ids ids, ffi::Result<Ids> new_slot_of,
                 ffi::Result<Ids> new_neuron_in, ffi::Result<Ids> new_priority,
                 ffi::Result<Ids> new_counts, ffi::Result<Ids> at,
                 ffi::Result<Ids> loads, ffi::Result<Ids> places,
                 ffi::Result<Ids> loaded, bool by_count) {
  const Directory pool = {new_slot_of->typed_data(),    new_neuron_in->typed_data(),
                          new_priority->typed_data(),   new_counts->typed_data(),
                          int(slot_of.element_count()), int(neuron_in.element_count())};
  if (pool.slot_of != slot_of.typed_data() || pool.neuron_in != neuron_in.typed_data() ||
      pool.priority != priority.typed_data() || pool.counts != counts.typed_data())
    return ffi::Error::Internal("the directory was copied");
  const int wanted = int(ids.element_count());
  if (wanted > pool.slots || priority.element_count() != slot_of.element_count() ||
      counts.element_count() != 2)
    return ffi::Error::InvalidArgument("a slot for each, a priority by neuron wanted");
  const size_t shared = Sets(nullptr, pool.slots, pool.neurons).words() * sizeof(Bits);
  if (shared > kMostShared)
    return ffi::Error::InvalidArgument("more neurons than one block can tell apart");
  give_slots<<<1, kThreads, shared, stream>>>(
      ids.typed_data(), wanted, by_count, pool, at->typed_data(), loads->typed_data(),
      places->typed_data(), loaded->typed_data());
  return launched();
}

}  // namespace m2jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(m2jax_cuda_slots, m2jax::slots,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<m2jax::Ids>()
                                  .Arg<m2jax::Ids>()
                                  .Arg<m2jax::Ids>()
                                  .Arg<m2jax::Ids>()
                                  .Arg<m2jax::Ids>()
                                  .Ret<m2jax::Ids>()
                                  .Ret<m2jax::Ids>()
                                  .Ret<m2jax::Ids>()
                                  .Ret<m2jax::Ids>()
                                  .Ret<m2jax::Ids>()
                                  .Ret<m2jax::Ids>()
                                  .Ret<m2jax::Ids>()
                                  .Ret<m2jax::Ids>()
                                  .Attr<bool>("by_count"),
                              m2jax::kTraits);
