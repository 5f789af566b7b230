#pragma once
// Random graphs, edge lists and samplers' draws, made where they are used and bit for bit those of the CPU. All of it is Thrust, so other device
// systems than CUDA (THRUST_DEVICE_SYSTEM: CPP, OMP) run it too, built without nvcc; the device system does not change the results. Every function takes, last, the
// execution policy that its work runs under: thrust::device if none is given, for a stream thrust::cuda::par.on(stream). The work is done on return, but for
// policies that do not wait (par_nosync). Scratch and results are allocated by Thrust, which throws when there is no memory, and cleared on the default stream.
//
// RandomRegular is not here: its permutations are shuffled and repaired swap by swap, each of which draws from what those before left, and one token's repair
// may spoil another's. Plan it on the host.

#include <polyattn/policy/pattern/random.hpp>
#include <polyattn/policy/sampler/sampler.hpp>

#include <thrust/binary_search.h>
#include <thrust/copy.h>
#include <thrust/count.h>
#include <thrust/device_vector.h>
#include <thrust/execution_policy.h>
#include <thrust/fill.h>
#include <thrust/for_each.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>
#include <thrust/reduce.h>
#include <thrust/sequence.h>
#include <thrust/sort.h>
#include <thrust/tabulate.h>
#include <thrust/transform.h>
#include <thrust/transform_scan.h>
#include <thrust/unique.h>

#include <algorithm>
#include <utility>

POLYATTN_BEGIN_NAMESPACE

/// Edges on the device. Unlike Edges, there are always rows + 1 offsets.
struct CudaEdges {
    thrust::device_vector<offset_t> offsets;
    thrust::device_vector<index_t> keys;

    /// A copy for PlanBuilder::edges.
    Edges to_host() const {
        Edges edges{std::vector<offset_t>(offsets.size()), std::vector<index_t>(keys.size())};
        thrust::copy(offsets.begin(), offsets.end(), edges.offsets.begin());
        thrust::copy(keys.begin(), keys.end(), edges.keys.begin());
        return edges;
    }
};

/// TransposedEdges on the device.
struct CudaTransposedEdges {
    thrust::device_vector<offset_t> offsets;  // keys + 1
    thrust::device_vector<index_t> queries;   // ascending within a key
    thrust::device_vector<offset_t> forward;
};

/// Windows of queries and the sources that those see: window w has the entries [offsets[w], offsets[w + 1]) of both lists, ascending, as many of one as of the other.
struct CudaWindows {
    thrust::device_vector<offset_t> offsets;
    thrust::device_vector<index_t> queries, sources;
};

namespace detail::cuda {

/// thrust::device.
using DefaultExecution = std::remove_cvref_t<decltype(thrust::device)>;

/// A number of the device's memory, on the host.
template <class Execution, class T>
T value_at(const Execution& execution, const T* number) {
    return thrust::reduce(execution, number, number + 1, T(0));
}

template <class T>
T* raw(thrust::device_vector<T>& vector) {
    return thrust::raw_pointer_cast(vector.data());
}
template <class T>
const T* raw(const thrust::device_vector<T>& vector) {
    return thrust::raw_pointer_cast(vector.data());
}

/// Position of the first of `size` ascending numbers that is >= value.
template <class T>
POLYATTN_HOST_DEVICE offset_t first_not_below(const T* numbers, offset_t size, T value) {
    offset_t at = 0;
    for (offset_t end = size; at < end;) {
        const offset_t middle = at + (end - at) / 2;
        if (numbers[middle] < value) at = middle + 1;
        else end = middle;
    }
    return at;
}

/// A set of numbers as an ascending list, in memory with room for them.
struct SortedNumbers {
    index_t* numbers;
    index_t size;

    POLYATTN_HOST_DEVICE bool operator()(index_t number) {
        const auto at = static_cast<index_t>(first_not_below(numbers, offset_t{size}, number));
        if (at < size && numbers[at] == number) return false;
        for (index_t i = size; i > at; --i) numbers[i] = numbers[i - 1];
        numbers[at] = number;
        ++size;
        return true;
    }
};
/// A set of numbers as bits.
struct NumberBits {
    std::uint32_t* words;

    POLYATTN_HOST_DEVICE bool operator()(index_t number) {
        const std::uint32_t bit = 1u << number % 32;
        if (words[number / 32] & bit) return false;
        words[number / 32] |= bit;
        return true;
    }
};
POLYATTN_HOST_DEVICE constexpr offset_t words_of(index_t numbers) { return (offset_t{numbers} + 31) / 32; }

/// RandomRow::distinct, count <= bound. Long draws need `bits`, zeros for all numbers below bound, which are zeros again afterwards.
POLYATTN_HOST_DEVICE inline void draw_distinct(RandomRow random, index_t bound, index_t count, std::uint32_t* bits, index_t* out) {
    if (count == bound) {
        for (index_t number = 0; number < bound; ++number) out[number] = number;
    } else if (!bits) {
        random.insert_distinct(bound, count, SortedNumbers{out, 0});
    } else {
        random.insert_distinct(bound, count, NumberBits{bits});
        for (offset_t word = 0; word < words_of(bound); ++word) {
            offset_t number = 32 * word;
            for (std::uint32_t rest = bits[word]; rest; rest >>= 1, ++number)
                if (rest & 1) *out++ = static_cast<index_t>(number);
            bits[word] = 0;
        }
    }
}

/// Edges of RandomTokens before a row. Rows before the first key have all keys to choose from, the others all but their own.
struct TokenOffset {
    index_t outside, count_outside, count;

    POLYATTN_HOST_DEVICE offset_t operator()(offset_t row) const {
        const offset_t before = row < outside ? row : outside;
        return before * count_outside + (row - before) * count;
    }
};
struct DrawTokens {
    std::uint64_t seed;
    index_t queries, keys;
    offset_t first, words;  // first row of this batch; words of its bits for each row
    const offset_t* offsets;
    index_t* edges;
    std::uint32_t* bits;

    POLYATTN_HOST_DEVICE void operator()(offset_t row_of_batch) const {
        const offset_t row = first + row_of_batch, self = row + keys - queries;
        const bool inside = self >= 0;
        index_t* const out = edges + offsets[row];
        const auto count = static_cast<index_t>(offsets[row + 1] - offsets[row]);
        const RandomRow random(seed, static_cast<std::uint32_t>(self), random_stream::random_tokens);
        draw_distinct(random, inside ? keys - 1 : keys, count, bits ? bits + row_of_batch * words : nullptr, out);
        if (!inside) return;
        for (index_t i = 0; i < count; ++i)
            if (out[i] >= self) ++out[i];
    }
};

struct DrawSources {
    RandomRow random;
    index_t keys, count;
    std::uint32_t* bits;
    index_t* out;

    POLYATTN_HOST_DEVICE void operator()(offset_t) const { draw_distinct(random, keys, count, bits, out); }
};

/// A pair as one number that sorts by row, then by key.
struct JoinPair {
    POLYATTN_HOST_DEVICE std::uint64_t operator()(index_t row, index_t key) const { return std::uint64_t{static_cast<std::uint32_t>(row)} << 32 | static_cast<std::uint32_t>(key); }
};
struct KeyOfPair {
    POLYATTN_HOST_DEVICE index_t operator()(std::uint64_t pair) const { return static_cast<index_t>(static_cast<std::uint32_t>(pair)); }
};
struct FirstOfRow {
    POLYATTN_HOST_DEVICE std::uint64_t operator()(index_t row) const { return JoinPair()(row, 0); }
};

/// Where a slot stands: its line, and the place in it. Lines that are ordered together are told apart by `segment`, which ascends with the slots.
struct LineSlot {
    std::uint32_t line, segment;
    index_t at;
};
struct OneLine {
    static constexpr bool alone = true;
    std::uint32_t line;
    POLYATTN_HOST_DEVICE LineSlot operator()(index_t slot) const { return {line, 0, slot}; }
};

template <class Lines>
struct PlaceSlot {
    std::uint64_t seed;
    std::uint32_t stream, hash;
    NoisyPlace place;
    Lines lines;
    const std::int32_t* quantiles;
    const std::int32_t* slopes;

    POLYATTN_HOST_DEVICE std::int64_t operator()(index_t slot) const {
        const LineSlot where = lines(slot);
        return place(where.at, RandomRow(seed, where.line, stream, hash).word(static_cast<std::uint64_t>(where.at)), quantiles, slopes);
    }
};
template <class Lines>
struct SegmentOfSlot {
    Lines lines;
    POLYATTN_HOST_DEVICE std::uint32_t operator()(index_t slot) const { return lines(slot).segment; }
};

/// detail::NoisyOrder on the device, of many lines at once.
class DeviceNoisyOrder {
public:
    DeviceNoisyOrder(const Draw& draw, std::uint32_t stream, double sigma)
        : seed_(draw.seed), stream_(stream), hash_(draw.hash()), place_(sigma), quantiles_(normal_quantiles.begin(), normal_quantiles.end()), slopes_(normal_slopes.begin(), normal_slopes.end()) {}

    /// Slot -> source, of the same line.
    template <class Execution, class Lines>
    thrust::device_vector<index_t> operator()(const Execution& execution, index_t count, const Lines& lines) const {
        thrust::device_vector<index_t> order(static_cast<std::size_t>(count));
        thrust::sequence(execution, order.begin(), order.end());
        if (!place_.moves()) return order;
        thrust::device_vector<std::int64_t> places(order.size());
        thrust::tabulate(execution, places.begin(), places.end(), PlaceSlot<Lines>{seed_, stream_, hash_, place_, lines, raw(quantiles_), raw(slopes_)});
        thrust::stable_sort_by_key(execution, places.begin(), places.end(), order.begin());
        if constexpr (!Lines::alone) {
            thrust::device_vector<std::uint32_t> segments(order.size());
            thrust::transform(execution, order.begin(), order.end(), segments.begin(), SegmentOfSlot<Lines>{lines});
            thrust::stable_sort_by_key(execution, segments.begin(), segments.end(), order.begin());
        }
        return order;
    }

private:
    std::uint64_t seed_;
    std::uint32_t stream_, hash_;
    NoisyPlace place_;
    thrust::device_vector<std::int32_t> quantiles_, slopes_;
};

/// A picture of rows x columns tokens, cut into parts; the first ones begin at row and column `first` <= 0. Numbers of their lines as in Grid2D.
struct Picture {
    index_t rows, columns, part_rows, part_columns, first;
    std::uint32_t number, lines;  // of the first part; lines that a part may have

    POLYATTN_HOST_DEVICE index_t part_row(index_t y) const { return (y - first) / part_rows; }
    POLYATTN_HOST_DEVICE index_t part_column(index_t x) const { return (x - first) / part_columns; }
    POLYATTN_HOST_DEVICE index_t top(index_t y) const { return first + part_row(y) * part_rows; }  // of the whole part, rim or not
    POLYATTN_HOST_DEVICE index_t left(index_t x) const { return first + part_column(x) * part_columns; }
    POLYATTN_HOST_DEVICE index_t y_in_part(index_t y) const { return y - (top(y) > 0 ? top(y) : 0); }
    POLYATTN_HOST_DEVICE index_t x_in_part(index_t x) const { return x - (left(x) > 0 ? left(x) : 0); }
    POLYATTN_HOST_DEVICE index_t parts_in_row() const { return part_column(columns - 1) + 1; }
    POLYATTN_HOST_DEVICE index_t parts_in_column() const { return part_row(rows - 1) + 1; }
    POLYATTN_HOST_DEVICE std::uint32_t part(index_t y, index_t x) const { return number + static_cast<std::uint32_t>(part_row(y) * parts_in_row() + part_column(x)); }
};
/// Rows within parts; slots row by row.
struct PictureRows {
    static constexpr bool alone = false;
    Picture picture;
    POLYATTN_HOST_DEVICE LineSlot operator()(index_t slot) const {
        const index_t y = slot / picture.columns, x = slot % picture.columns;
        return {picture.part(y, x) * picture.lines + static_cast<std::uint32_t>(picture.y_in_part(y)), static_cast<std::uint32_t>(y * picture.parts_in_row() + picture.part_column(x)), picture.x_in_part(x)};
    }
};
/// Columns within parts; slots column by column.
struct PictureColumns {
    static constexpr bool alone = false;
    Picture picture;
    POLYATTN_HOST_DEVICE LineSlot operator()(index_t slot) const {
        const index_t x = slot / picture.rows, y = slot % picture.rows;
        return {picture.part(y, x) * picture.lines + static_cast<std::uint32_t>(picture.x_in_part(x)), static_cast<std::uint32_t>(x * picture.parts_in_column() + picture.part_row(y)), picture.y_in_part(y)};
    }
};
/// The token at a slot after both shuffles.
struct ShuffledToken {
    index_t rows, columns;
    const index_t *across, *down;  // orders of the rows, and of the columns
    POLYATTN_HOST_DEVICE index_t operator()(index_t slot) const {
        const index_t x = slot % columns, y = down[x * rows + slot / columns] % rows;
        return across[y * columns + x];
    }
};

/// Which of `windows` windows of whole rows a slot is in: the b with height b / windows <= row < height (b + 1) / windows.
struct RowWindow {
    index_t height, width, windows;
    POLYATTN_HOST_DEVICE std::uint32_t operator()(index_t slot) const { return static_cast<std::uint32_t>(((offset_t{slot / width} + 1) * windows - 1) / height); }
};
/// Which quarter of a part.
struct QuarterOfPart {
    Picture picture;
    POLYATTN_HOST_DEVICE std::uint32_t operator()(index_t slot) const {
        const index_t y = slot / picture.columns, x = slot % picture.columns;
        const bool below = y - picture.top(y) >= picture.part_rows / 2, right = x - picture.left(x) >= picture.part_columns / 2;
        return 4 * picture.part(y, x) + (below ? 2u : 0u) + (right ? 1u : 0u);
    }
};
/// A slot's token after its window.
template <class WindowOf>
struct TokenInWindow {
    WindowOf window_of;
    const index_t* tokens;  // null: the slot itself
    POLYATTN_HOST_DEVICE std::uint64_t operator()(index_t slot) const { return std::uint64_t{window_of(slot)} << 32 | static_cast<std::uint32_t>(tokens ? tokens[slot] : slot); }
};
struct BeginsWindow {
    const std::uint64_t* pairs;
    POLYATTN_HOST_DEVICE bool operator()(offset_t at) const { return at == 0 || pairs[at] >> 32 != pairs[at - 1] >> 32; }
};

/// Windows of slots, whose sources are the tokens at them.
template <class Execution, class WindowOf>
CudaWindows windows_of_slots(const Execution& execution, const thrust::device_vector<index_t>& tokens, const WindowOf& window_of) {
    CudaWindows windows{{}, thrust::device_vector<index_t>(tokens.size()), thrust::device_vector<index_t>(tokens.size())};
    thrust::device_vector<std::uint64_t> pairs(tokens.size());
    for (const bool sources : {false, true}) {
        thrust::tabulate(execution, pairs.begin(), pairs.end(), TokenInWindow<WindowOf>{window_of, sources ? raw(tokens) : nullptr});
        thrust::sort(execution, pairs.begin(), pairs.end());
        thrust::transform(execution, pairs.begin(), pairs.end(), (sources ? windows.sources : windows.queries).begin(), KeyOfPair());
    }
    const thrust::counting_iterator<offset_t> first(0), last(static_cast<offset_t>(pairs.size()));
    windows.offsets.resize(static_cast<std::size_t>(thrust::count_if(execution, first, last, BeginsWindow{raw(pairs)})) + 1);
    const auto end = thrust::copy_if(execution, first, last, windows.offsets.begin(), BeginsWindow{raw(pairs)});
    thrust::fill(execution, end, windows.offsets.end(), static_cast<offset_t>(pairs.size()));
    return windows;
}

/// Words of a stream that draw cells, a row and then a key, and those that are refused. In state 0 a row is wanted, in 1 a key; a word is a map of states: bit s is
/// the state after s.
struct CellWords {
    RandomRow random;
    std::uint32_t queries, keys;
    std::uint64_t first;

    POLYATTN_HOST_DEVICE bool bounded(offset_t word, unsigned state, std::uint32_t& number) const {
        return RandomRow::bounded(random.word(first + static_cast<std::uint64_t>(word)), state ? keys : queries, number);
    }
    POLYATTN_HOST_DEVICE std::uint8_t operator()(offset_t word) const {
        std::uint32_t number;
        return static_cast<std::uint8_t>((bounded(word, 0, number) ? 1u : 0u) | (bounded(word, 1, number) ? 0u : 2u));
    }
};
inline constexpr std::uint8_t same_state = 2;
struct ThenWord {
    POLYATTN_HOST_DEVICE std::uint8_t operator()(std::uint8_t before, std::uint8_t after) const {
        return static_cast<std::uint8_t>((after >> (before & 1) & 1) | (after >> (before >> 1 & 1) & 1) << 1);
    }
};
struct DrawsNumber {
    CellWords words;
    const std::uint8_t* before;  // all words before one, as one map
    POLYATTN_HOST_DEVICE bool operator()(offset_t word) const {
        std::uint32_t number;
        return words.bounded(word, before[word] & 1u, number);
    }
};
struct CellOfWords {
    CellWords words;
    const offset_t* drawn;  // words that draw a number: rows and keys by turns
    POLYATTN_HOST_DEVICE std::uint64_t operator()(offset_t cell) const {
        std::uint32_t row = 0, key = 0;
        words.bounded(drawn[2 * cell], 0, row);
        words.bounded(drawn[2 * cell + 1], 1, key);
        return std::uint64_t{row} << 32 | key;
    }
};
struct ComesUntil {
    offset_t last;
    POLYATTN_HOST_DEVICE bool operator()(offset_t turn) const { return turn <= last; }
};
struct Remainder {
    index_t divisor;
    POLYATTN_HOST_DEVICE index_t operator()(offset_t number) const { return static_cast<index_t>(number % divisor); }
};
struct Multiple {
    offset_t factor;
    POLYATTN_HOST_DEVICE offset_t operator()(offset_t number) const { return factor * number; }
};

/// The edges of sorted unique pairs.
template <class Execution, class Pairs>
CudaEdges edges_of_sorted_pairs(const Execution& execution, Pairs first, Pairs last, index_t queries) {
    CudaEdges edges{thrust::device_vector<offset_t>(static_cast<std::size_t>(queries) + 1), thrust::device_vector<index_t>(static_cast<std::size_t>(last - first))};
    thrust::transform(execution, first, last, edges.keys.begin(), KeyOfPair());
    const auto row = thrust::make_transform_iterator(thrust::counting_iterator<index_t>(0), FirstOfRow());
    thrust::lower_bound(execution, first, last, row, row + static_cast<std::ptrdiff_t>(edges.offsets.size()), edges.offsets.begin());
    return edges;
}

}  // namespace detail::cuda

/// The edges of pattern.plan(queries, keys), (queries + 1) offsets and the keys of each row in ascending order.
/// Throws invalid_input for numbers below 0.
/// One thread draws a row: O(count^2) steps up to RandomRow::longest_sorted numbers, beyond O(count + keys) with scratch of at most the edges' size
/// (or one row's). Source: Diffuser (AAAI 2023), section "random attention"; distinct numbers: Floyd (CACM 30(9), 1987).
template <class Execution = detail::cuda::DefaultExecution>
CudaEdges random_tokens_on_device(const RandomTokens& pattern, index_t queries, index_t keys, const Execution& execution = thrust::device) {
    pattern.validate();
    detail::require(queries >= 0, "queries", "a number >= 0", queries);
    detail::require(keys >= 0, "keys", "a number >= 0", keys);
    const detail::cuda::TokenOffset offset{std::max(queries - keys, index_t{0}), std::min(pattern.count, keys), std::min(pattern.count, std::max(keys - 1, index_t{0}))};
    const offset_t total = offset(queries);
    CudaEdges edges{thrust::device_vector<offset_t>(static_cast<std::size_t>(queries) + 1), thrust::device_vector<index_t>(static_cast<std::size_t>(total))};
    thrust::tabulate(execution, edges.offsets.begin(), edges.offsets.end(), offset);
    const bool sorts = pattern.count <= RandomRow::longest_sorted;
    const offset_t words = sorts ? 0 : detail::cuda::words_of(keys);
    const offset_t batch = words == 0 ? offset_t{queries} : std::clamp(total / words, offset_t{1}, std::max(offset_t{queries}, offset_t{1}));
    thrust::device_vector<std::uint32_t> bits(static_cast<std::size_t>(batch * words), 0u);
    for (offset_t first = 0; first < queries; first += batch)
        thrust::for_each_n(execution, thrust::counting_iterator<offset_t>(0), std::min(batch, queries - first),
                           detail::cuda::DrawTokens{pattern.seed, queries, keys, first, words, detail::cuda::raw(edges.offsets), detail::cuda::raw(edges.keys),
                                                    words == 0 ? nullptr : detail::cuda::raw(bits)});
    return edges;
}

/// Pairs (rows[p], keys[p]) in any order, repeats allowed, to sorted unique rows: detail::edges_from_pairs. Keys must be >= 0.
/// Throws invalid_input if there are not as many keys as rows, or a row is not one of [0, queries).
/// O(pairs) for a radix sort of 64-bit numbers, O(queries log pairs) for the offsets.
template <class Execution = detail::cuda::DefaultExecution>
CudaEdges edges_from_pairs_on_device(const thrust::device_vector<index_t>& rows, const thrust::device_vector<index_t>& keys, index_t queries, const Execution& execution = thrust::device) {
    detail::require(queries >= 0, "queries", "a number >= 0", queries);
    detail::require(rows.size() == keys.size(), "keys of pairs", [&] { return detail::text("one for each of ", rows.size(), " rows"); }, keys.size());
    thrust::device_vector<std::uint64_t> pairs(rows.size());
    thrust::transform(execution, rows.begin(), rows.end(), keys.begin(), pairs.begin(), detail::cuda::JoinPair());
    thrust::sort(execution, pairs.begin(), pairs.end());
    if (!pairs.empty()) {
        // A row below 0 became one of the largest.
        const std::uint64_t last = detail::cuda::value_at(execution, detail::cuda::raw(std::as_const(pairs)) + pairs.size() - 1);
        const auto row = static_cast<index_t>(static_cast<std::uint32_t>(last >> 32));
        detail::require(row >= 0 && row < queries, "rows of pairs", [&] { return detail::text("indices of [0, ", queries, ")"); }, row);
    }
    return detail::cuda::edges_of_sorted_pairs(execution, pairs.begin(), thrust::unique(execution, pairs.begin(), pairs.end()), queries);
}

/// The edges of ErdosRenyi::plan(queries, keys). Throws invalid_input for numbers below 0.
/// Words of the pattern's random stream become cells by a scan, since each hangs on how many were refused before it; the first `per_token` x queries that differ are
/// the edges. O(cells) a round, of radix sorts of 64-bit numbers: two rounds, or up to some log(keys) where most cells are wanted. Source: Erdos and Renyi (1959).
template <class Execution = detail::cuda::DefaultExecution>
CudaEdges erdos_renyi_on_device(const ErdosRenyi& pattern, index_t queries, index_t keys, const Execution& execution = thrust::device) {
    using namespace detail::cuda;
    pattern.validate();
    detail::require(queries >= 0, "queries", "a number >= 0", queries);
    detail::require(keys >= 0, "keys", "a number >= 0", keys);
    if (pattern.per_token >= keys) {
        CudaEdges edges{thrust::device_vector<offset_t>(static_cast<std::size_t>(queries) + 1), thrust::device_vector<index_t>(static_cast<std::size_t>(queries) * static_cast<std::size_t>(keys))};
        thrust::tabulate(execution, edges.offsets.begin(), edges.offsets.end(), Multiple{keys});
        thrust::tabulate(execution, edges.keys.begin(), edges.keys.end(), Remainder{keys});
        return edges;
    }
    CellWords words{RandomRow(pattern.seed, 0, random_stream::erdos_renyi), static_cast<std::uint32_t>(queries), static_cast<std::uint32_t>(keys), 0};
    const offset_t wanted = offset_t{queries} * pattern.per_token;
    const double draws_each = double(keys) / double(keys - pattern.per_token);  // for a new cell, at the end
    thrust::device_vector<std::uint64_t> cells;
    // Words are refused now and then; a round that comes to no cell at all looks at more of them.
    for (offset_t size = 0, spare = 64; size < wanted;) {
        const offset_t draws = std::min(wanted, static_cast<offset_t>(double(wanted - size) * draws_each) + 1), count = 2 * draws + spare;
        const thrust::counting_iterator<offset_t> word(0);
        thrust::device_vector<std::uint8_t> before(static_cast<std::size_t>(count));
        thrust::transform_exclusive_scan(execution, word, word + count, before.begin(), words, same_state, ThenWord());
        thrust::device_vector<offset_t> numbers(static_cast<std::size_t>(count));
        const offset_t made = (thrust::copy_if(execution, word, word + count, numbers.begin(), DrawsNumber{words, raw(before)}) - numbers.begin()) / 2;
        if (made == 0) {
            spare *= 2;
            continue;
        }
        // The cells so far, all of turn 0, and the new ones by turns: of equal ones the first stays, and of too many those that came last go.
        thrust::device_vector<std::uint64_t> all(static_cast<std::size_t>(size + made));
        thrust::device_vector<offset_t> turns(all.size());
        thrust::copy(execution, cells.begin(), cells.end(), all.begin());
        thrust::transform(execution, word, word + made, all.begin() + size, CellOfWords{words, raw(numbers)});
        thrust::fill(execution, turns.begin(), turns.begin() + size, offset_t{0});
        thrust::sequence(execution, turns.begin() + size, turns.end(), offset_t{1});
        words.first += static_cast<std::uint64_t>(value_at(execution, raw(std::as_const(numbers)) + 2 * made - 1)) + 1;
        thrust::stable_sort_by_key(execution, all.begin(), all.end(), turns.begin());
        const offset_t unique = thrust::unique_by_key(execution, all.begin(), all.end(), turns.begin()).first - all.begin();
        size = std::min(unique, wanted);
        thrust::device_vector<offset_t> sorted(static_cast<std::size_t>(unique));
        thrust::copy(execution, turns.begin(), turns.begin() + unique, sorted.begin());
        thrust::sort(execution, sorted.begin(), sorted.end());
        const ComesUntil last{value_at(execution, raw(std::as_const(sorted)) + size - 1)};
        cells = thrust::device_vector<std::uint64_t>(static_cast<std::size_t>(size));
        thrust::copy_if(execution, all.begin(), all.begin() + unique, turns.begin(), cells.begin(), last);
    }
    return edges_of_sorted_pairs(execution, cells.begin(), cells.end(), queries);
}

/// Edges by key: TransposedEdges of a plan with these edges. The edges' keys must lie in [0, keys).
/// Throws invalid_input if keys < 0. O(edges) for a radix sort, O((edges + keys) log edges) for the rows and the offsets.
template <class Execution = detail::cuda::DefaultExecution>
CudaTransposedEdges transpose_on_device(const CudaEdges& edges, index_t keys, const Execution& execution = thrust::device) {
    detail::require(keys >= 0, "keys", "a number >= 0", keys);
    const std::size_t count = edges.keys.size();
    CudaTransposedEdges transposed{thrust::device_vector<offset_t>(static_cast<std::size_t>(keys) + 1), thrust::device_vector<index_t>(count), thrust::device_vector<offset_t>(count)};
    if (count == 0) return transposed;
    thrust::device_vector<index_t> sorted(count);
    thrust::copy(execution, edges.keys.begin(), edges.keys.end(), sorted.begin());
    thrust::sequence(execution, transposed.forward.begin(), transposed.forward.end());
    thrust::stable_sort_by_key(execution, sorted.begin(), sorted.end(), transposed.forward.begin());
    const thrust::counting_iterator<index_t> key(0);
    thrust::lower_bound(execution, sorted.begin(), sorted.end(), key, key + transposed.offsets.size(), transposed.offsets.begin());
    // As many rows end before an edge as there are rows before its own.
    thrust::upper_bound(execution, edges.offsets.begin() + 1, edges.offsets.end(), transposed.forward.begin(), transposed.forward.end(), transposed.queries.begin());
    return transposed;
}

/// The stable order of i + noise_i, i < count: slot -> source, `count` numbers; detail::NoisyOrder. The noise is normal with deviation
/// `sigma_in_tokens`; infinite_sigma: all orders are equally likely. A pure function of the arguments. O(count), a radix sort of 64-bit numbers.
/// Throws invalid_input if count < 0. Source: SSA (KDD 2023), section 3.2.
template <class Execution = detail::cuda::DefaultExecution>
thrust::device_vector<index_t> noisy_order_on_device(const Draw& draw, std::uint32_t stream, double sigma_in_tokens, index_t count, std::uint32_t line, const Execution& execution = thrust::device) {
    detail::require(count >= 0, "count", "a number >= 0", count);
    return detail::cuda::DeviceNoisyOrder(draw, stream, sigma_in_tokens)(execution, count, detail::cuda::OneLine{line});
}

/// The keys that all queries see under Unbiased, ascending: kept(keys) numbers. A sampler with per_item: of batch item `item`, `keys` its own number.
/// Throws invalid_input for invalid arguments. One thread draws, O(keys). Source: SSA (KDD 2023), section 3.1.
template <class Execution = detail::cuda::DefaultExecution>
thrust::device_vector<index_t> unbiased_sources_on_device(const Unbiased& sampler, index_t keys, const Draw& draw, index_t item = 0, const Execution& execution = thrust::device) {
    sampler.validate();
    detail::require(keys >= 0, "keys", "a number >= 0", keys);
    const index_t count = sampler.kept(keys);
    thrust::device_vector<index_t> sources(static_cast<std::size_t>(count));
    thrust::device_vector<std::uint32_t> bits(static_cast<std::size_t>(detail::cuda::words_of(keys)), 0u);
    const RandomRow random(draw.seed, static_cast<std::uint32_t>(item), random_stream::sampled_keys, draw.hash());
    thrust::for_each_n(execution, thrust::counting_iterator<offset_t>(0), 1, detail::cuda::DrawSources{random, keys, count, detail::cuda::raw(bits), detail::cuda::raw(sources)});
    return sources;
}

/// The sources of each window of LocallyBiased, ascending: row b of the result is window b of L. In the causal form a query of the window sees those
/// up to its own position. Throws invalid_input for invalid arguments or fewer keys than windows.
/// O(keys), causal O(L keys), of radix sorts. Source: SSA (KDD 2023), sections 3.1 and 3.2.
template <int L, class Execution = detail::cuda::DefaultExecution>
CudaEdges locally_biased_sources_on_device(const LocallyBiased<L>& sampler, index_t keys, const Draw& draw, bool causal = false, const Execution& execution = thrust::device) {
    sampler.validate();
    detail::require(keys >= 0, "keys", "a number >= 0", keys);
    detail::require_windows("L of LocallyBiased", L, keys);
    const detail::cuda::DeviceNoisyOrder noisy(draw, random_stream::shuffled_keys, sampler.sigma.at(draw.layer) * keys);
    thrust::device_vector<index_t> sources(static_cast<std::size_t>(keys)), windows(static_cast<std::size_t>(keys));
    if (!causal) sources = noisy(execution, keys, detail::cuda::OneLine{0});
    for (index_t b = 0; b < L; ++b) {
        const Bounds window = detail::window_of(keys, L, b);
        thrust::fill(execution, windows.begin() + window.begin, windows.begin() + window.end, b);
        if (!causal) continue;
        const thrust::device_vector<index_t> order = noisy(execution, window.end, detail::cuda::OneLine{static_cast<std::uint32_t>(b)});
        thrust::copy(execution, order.begin() + window.begin, order.end(), sources.begin() + window.begin);
    }
    return edges_from_pairs_on_device(windows, sources, L, execution);
}

/// The windows of Grid2D, those of sample()'s tiles and in their order: all tokens as queries, and as many sources. In the causal form a query sees the sources up
/// to its own position. Throws invalid_input for invalid arguments, unless keys == height * width, and for `window` in the causal form.
/// O(keys), causal O(row_windows keys), of radix sorts. Source: SSA (KDD 2023), section 3.4.
template <class Execution = detail::cuda::DefaultExecution>
CudaWindows grid_windows_on_device(const Grid2D& sampler, index_t keys, const Draw& draw, bool causal = false, const Execution& execution = thrust::device) {
    using namespace detail::cuda;
    sampler.validate();
    sampler.check_picture(keys, keys, causal);
    const bool by_rows = sampler.row_windows > 0;
    const double share = sampler.sigma.at(draw.layer);
    const DeviceNoisyOrder across(draw, random_stream::shuffled_columns, share * (by_rows ? sampler.width : sampler.window)), down(draw, random_stream::shuffled_rows, share * (by_rows ? sampler.height : sampler.window));
    const auto lines = static_cast<std::uint32_t>(std::max(sampler.height, sampler.width));
    thrust::device_vector<index_t> tokens(static_cast<std::size_t>(keys));
    // Slots [first, last) of a picture after both shuffles.
    const auto shuffle = [&](const Picture& picture, index_t first, index_t last) {
        const index_t count = picture.rows * picture.columns;
        const thrust::device_vector<index_t> rows = across(execution, count, PictureRows{picture}), columns = down(execution, count, PictureColumns{picture});
        const thrust::counting_iterator<index_t> slot(first);
        thrust::transform(execution, slot, slot + (last - first), tokens.begin() + first, ShuffledToken{picture.rows, picture.columns, raw(rows), raw(columns)});
    };
    if (!by_rows) {
        const Picture picture{sampler.height, sampler.width, sampler.window, sampler.window, sampler.shift > 0 ? sampler.shift - sampler.window : 0, 0, lines};
        shuffle(picture, 0, keys);
        return windows_of_slots(execution, tokens, QuarterOfPart{picture});
    }
    if (!causal) shuffle({sampler.height, sampler.width, sampler.height, sampler.width, 0, 0, lines}, 0, keys);
    for (index_t b = 0; causal && b < sampler.row_windows; ++b) {
        const Bounds rows = detail::window_of(sampler.height, sampler.row_windows, b);
        shuffle({rows.end, sampler.width, rows.end, sampler.width, 0, static_cast<std::uint32_t>(b), lines}, rows.begin * sampler.width, rows.end * sampler.width);
    }
    return windows_of_slots(execution, tokens, RowWindow{sampler.height, sampler.width, sampler.row_windows});
}

POLYATTN_END_NAMESPACE
