// The directory of a slot pool, decided as `reference.py` decides it, to the last victim.
// Knows no XLA: any device's host compiles it in a second.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// Between what is read and what is asked for: the directory was long out of any cache.
constexpr int64_t kAhead = 32;

struct Ranked {
  uint64_t value;
  int64_t equal_before;
};

// Value number `rank` (from 0) in ascending order. By digits: no branch hangs on values,
// which cannot be foreseen.
Ranked ranked(const std::vector<uint64_t>& values, int64_t rank) {
  constexpr int kDigitBits = 10;
  uint64_t low = values[0], high = values[0];
  for (const uint64_t value : values) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  const int bits = high > low ? 64 - __builtin_clzll(high - low) : 0;
  const int shift = std::max(0, bits - kDigitBits);
  int64_t counts[1 << kDigitBits] = {};
  for (const uint64_t value : values) ++counts[(value - low) >> shift];
  uint64_t digit = 0;
  while (rank >= counts[digit]) rank -= counts[digit++];
  if (shift == 0) return {low + digit, rank};
  std::vector<uint64_t> same;
  for (const uint64_t value : values)
    if ((value - low) >> shift == digit) same.push_back(value);
  return ranked(same, rank);
}

// The `count` slots below `held`, ascending, that are not kept and whose neurons have the
// lowest priority; of equal ones the lowest slots. Here, too, no branch hangs on a slot:
// each is written where the next one goes, and stays if it counts.
std::vector<int32_t> chosen(const int32_t* neuron_in, const int64_t* priority,
                            int64_t held, const uint8_t* kept, int64_t keeps,
                            int64_t count) {
  if (count == 0) return {};
  std::vector<int32_t> slots(held - keeps + 1);
  std::vector<uint64_t> order(held - keeps + 1);
  int64_t others = 0;
  for (int64_t slot = 0; slot < held; ++slot) {
    if (slot + kAhead < held) __builtin_prefetch(priority + neuron_in[slot + kAhead]);
    slots[others] = int32_t(slot);
    // As unsigned, in the same order.
    order[others] = uint64_t(priority[neuron_in[slot]]) ^ uint64_t(1) << 63;
    others += !kept[slot];
  }
  order.resize(others);
  const auto [last, equal_before] = ranked(order, count - 1);
  int64_t victims = 0, ties = equal_before + 1;
  for (int64_t i = 0; i < others; ++i) {
    slots[victims] = slots[i];
    const bool is_tie = order[i] == last && ties > 0;
    ties -= is_tie;
    victims += order[i] < last || is_tie;
  }
  slots.resize(victims);
  return slots;
}

// Small distinct integers in ascending order.
void sort(std::vector<int32_t>& values, int64_t limit) {
  std::vector<uint64_t> bits((limit + 63) / 64);
  for (const uint32_t value : values) bits[value / 64] |= uint64_t(1) << value % 64;
  auto next = values.begin();
  for (size_t word = 0; word < bits.size(); ++word)
    for (uint64_t left = bits[word]; left; left &= left - 1)
      *next++ = int32_t(word * 64 + __builtin_ctzll(left));
}

}  // namespace

// slot_of: by neuron, -1 = none. neuron_in: by slot. priority: by neuron. held: slots
// that are taken. ids: [size] of who is wanted.
// found: [4, size]: the slot of each; where in ids newcomers are; their slots; victims.
// Returns how many newcomers there are; -1 if ids are refused, and nothing was changed.
extern "C" int64_t m2jax_give_slots(int64_t neurons, int64_t slots, int64_t size,
                                    int64_t held, int32_t* slot_of, int32_t* neuron_in,
                                    const int64_t* priority, const int64_t* ids,
                                    int32_t* found) {
  int32_t *at = found, *loads = at + size, *load_slots = loads + size;
  int32_t* victims = load_slots + size;
  if (size > slots) return -1;
  std::vector<uint8_t> is_wanted(neurons), with_none(slots + 1);
  // Place -1 stands for "no slot".
  uint8_t* kept = with_none.data() + 1;
  int64_t count = 0;
  for (int64_t k = 0; k < size; ++k) {
    const int64_t id = ids[k];
    // Harmless wherever an id that will be refused points.
    if (k + kAhead < size) __builtin_prefetch(slot_of + ids[k + kAhead]);
    // As unsigned, a negative id is a huge one.
    if (uint64_t(id) >= uint64_t(neurons) || is_wanted[id]) return -1;
    is_wanted[id] = 1;
    const int32_t slot = slot_of[id];
    at[k] = slot;
    kept[slot] = 1;
    loads[count] = int32_t(k);
    count += slot < 0;
  }
  if (count == 0) return 0;
  const int64_t free = std::min(count, slots - held);
  const int64_t keeps = size - count;
  const auto leaving = chosen(neuron_in, priority, held, kept, keeps, count - free);
  for (const int32_t slot : leaving) {
    *victims++ = neuron_in[slot];
    slot_of[neuron_in[slot]] = -1;
  }
  std::vector<int32_t> newcomers(count);
  for (int64_t m = 0; m < count; ++m) newcomers[m] = int32_t(ids[loads[m]]);
  sort(newcomers, neurons);
  for (int64_t m = 0; m < count; ++m) {
    const int32_t slot = m < free ? int32_t(held + m) : leaving[m - free];
    slot_of[newcomers[m]] = slot;
    neuron_in[slot] = newcomers[m];
  }
  for (int64_t m = 0; m < count; ++m)
    at[loads[m]] = load_slots[m] = slot_of[ids[loads[m]]];
  return count;
}
