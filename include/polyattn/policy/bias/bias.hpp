#pragma once

#include <polyattn/policy/bias/concept.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

POLYATTN_BEGIN_NAMESPACE

/// -slope(head) * |position - key|. Slopes of Press et al., "Train short, test long" (2022): 2^(-8 (h + 1) / heads) for a power
/// of two; else those of the next lower power, then every second one of the next higher.
class Alibi {
public:
    using policy_kind = bias_kind;

    explicit Alibi(index_t heads = 1) {
        detail::require(heads >= 1, "heads", "a number of heads >= 1", heads);
        index_t power = 1;
        while (power * 2 <= heads) power *= 2;
        std::vector<double> slopes;
        for (index_t h = 0; h < power; ++h) slopes.push_back(std::exp2(-8. * (h + 1) / power));
        for (index_t h = 0; power + h < heads; ++h) slopes.push_back(std::exp2(-4. * (2 * h + 1) / power));
        slopes_ = std::make_shared<const std::vector<double>>(std::move(slopes));
    }

    double slope(index_t head) const { return (*slopes_)[static_cast<std::size_t>(head)]; }

    struct Bound {
        static constexpr bool depends_on_distance = true;
        std::shared_ptr<const std::vector<double>> slopes;
        offset_t offset;
        double operator()(index_t, index_t head, index_t query, index_t key) const {
            return -(*slopes)[static_cast<std::size_t>(head)] * static_cast<double>(std::abs(query + offset - key));
        }
    };
    Bound bind(index_t queries, index_t keys) const { return {slopes_, offset_t{keys} - queries}; }
    /// Throws invalid_input if the layer has another number of heads.
    void check_heads(index_t heads) const {
        detail::require(heads == static_cast<index_t>(slopes_->size()), "heads of Alibi", [&] { return std::to_string(heads); }, slopes_->size());
    }

private:
    std::shared_ptr<const std::vector<double>> slopes_;
};

/// A learned table of relative positions, [heads][2 * reach + 1]: entry key - position + reach. Distances beyond `reach` share
/// the outermost entries. Source: Shaw et al., "Self-attention with relative position representations" (2018), as a bias.
struct RelativePosition {
    using policy_kind = bias_kind;
    index_t heads = 1;
    index_t reach = 0;
    std::vector<double> table = {0};

    void validate() const {
        detail::require(heads >= 1, "heads", "a number of heads >= 1", heads);
        detail::require(reach >= 0, "reach", "a distance >= 0", reach);
        detail::require_table(table, gradient_size(), "table");
    }
    void check_heads(index_t layer_heads) const {
        detail::require(layer_heads == heads, "heads of RelativePosition", [&] { return std::to_string(layer_heads); }, heads);
    }

    struct Bound {
        static constexpr bool depends_on_distance = true;
        const RelativePosition* self;
        offset_t offset;
        std::size_t at(index_t head, index_t query, index_t key) const {
            const offset_t most = self->reach, distance = std::clamp<offset_t>(key - (query + offset), -most, most);
            return static_cast<std::size_t>(head * (2 * most + 1) + distance + most);
        }
        double operator()(index_t, index_t head, index_t query, index_t key) const { return self->table[at(head, query, key)]; }
        void accumulate_gradient(std::span<double> gradient, index_t, index_t head, index_t query, index_t key, double d_score) const {
            gradient[at(head, query, key)] += d_score;
        }
        std::size_t gradient_size() const { return self->gradient_size(); }
    };
    /// The bound bias refers to this one.
    Bound bind(index_t queries, index_t keys) const { return {this, offset_t{keys} - queries}; }
    std::size_t gradient_size() const { return static_cast<std::size_t>(heads) * (2 * static_cast<std::size_t>(reach) + 1); }
};

/// A learned table of relative positions in a picture `width` tokens wide, [heads][2 * reach + 1][2 * reach + 1], by rows and
/// columns: entry (key row - query row + reach, key column - query column + reach). Distances beyond `reach` share the outermost
/// entries. Query i and key j are pixels i and j, whatever their numbers. Source: Liu et al., Swin Transformer (2021), equation 4.
struct RelativePosition2D {
    using policy_kind = bias_kind;
    index_t heads = 1;
    index_t width = 1;
    index_t reach = 0;
    std::vector<double> table = {0};

    void validate() const {
        detail::require(heads >= 1, "heads", "a number of heads >= 1", heads);
        detail::require(width >= 1, "width", "a number of pixels >= 1", width);
        detail::require(reach >= 0, "reach", "a distance >= 0", reach);
        detail::require_table(table, gradient_size(), "table");
    }
    void check_heads(index_t layer_heads) const {
        detail::require(layer_heads == heads, "heads of RelativePosition2D", [&] { return std::to_string(layer_heads); }, heads);
    }
    double operator()(index_t, index_t head, index_t query, index_t key) const { return table[at(head, query, key)]; }
    void accumulate_gradient(std::span<double> gradient, index_t, index_t head, index_t query, index_t key, double d_score) const {
        gradient[at(head, query, key)] += d_score;
    }
    std::size_t gradient_size() const {
        const auto side = 2 * static_cast<std::size_t>(reach) + 1;
        return static_cast<std::size_t>(heads) * side * side;
    }

private:
    std::size_t at(index_t head, index_t query, index_t key) const {
        const auto entry = [&](index_t distance) { return static_cast<std::size_t>(std::clamp(distance, -reach, reach) + reach); };
        const auto side = 2 * static_cast<std::size_t>(reach) + 1;
        return (static_cast<std::size_t>(head) * side + entry(key / width - query / width)) * side + entry(key % width - query % width);
    }
};

/// A learned table [rows][heads] whose row a functor of (batch, query, key) names: graph distances, buckets, types of tokens.
/// Indices are those of the call's q and k. A row outside the table throws invalid_input from the call.
template <class Index>
struct TableBias {
    using policy_kind = bias_kind;
    Index index;
    index_t heads = 1;
    std::vector<double> table = {};

    void validate() const {
        detail::require(heads >= 1, "heads", "a number of heads >= 1", heads);
        detail::require(table.size() % static_cast<std::size_t>(heads) == 0, "table", "rows x heads entries", table.size());
        detail::require_table(table, table.size(), "table");
    }
    void check_heads(index_t layer_heads) const {
        detail::require(layer_heads == heads, "heads of TableBias", [&] { return std::to_string(layer_heads); }, heads);
    }
    double operator()(index_t batch, index_t head, index_t query, index_t key) const { return table[at(batch, head, query, key)]; }
    void accumulate_gradient(std::span<double> gradient, index_t batch, index_t head, index_t query, index_t key, double d_score) const {
        gradient[at(batch, head, query, key)] += d_score;
    }
    std::size_t gradient_size() const { return table.size(); }

private:
    std::size_t at(index_t batch, index_t head, index_t query, index_t key) const {
        const auto row = static_cast<offset_t>(index(batch, query, key));
        const auto rows = static_cast<offset_t>(table.size()) / heads;
        if (row < 0 || row >= rows)
            throw invalid_input("row of the bias table", detail::text("rows of [0, ", rows, ")"), std::to_string(row));
        return static_cast<std::size_t>(row * heads + head);
    }
};
template <class Index>
TableBias(Index, index_t, std::vector<double>) -> TableBias<Index>;

/// Any functor of (batch, head, query, key), indices of the call's q and k.
template <class F>
struct FunctionBias {
    using policy_kind = bias_kind;
    F f;
    POLYATTN_HOST_DEVICE double operator()(index_t batch, index_t head, index_t query, index_t key) const { return static_cast<double>(f(batch, head, query, key)); }
};
template <class F>
FunctionBias(F) -> FunctionBias<F>;

static_assert(BiasPolicy<Alibi> && BiasPolicy<RelativePosition> && BiasPolicy<RelativePosition2D>);

POLYATTN_END_NAMESPACE
