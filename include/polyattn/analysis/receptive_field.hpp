#pragma once

#include <polyattn/plan/plan.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Hops from a query to every key: the least k for which (A^k)_ij can differ from 0, at least 1 (A^0 is the token itself);
/// -1 if no number of hops reaches the key. Breadth first, O(pairs). Throws invalid_input unless the plan is square.
inline std::vector<index_t> hop_distances(const Plan& plan, index_t query) {
    detail::require(plan.queries() == plan.keys(), "plan", "as many queries as keys", plan.queries());
    detail::require(query >= 0 && query < plan.queries(), "query", "a token of the plan", query);
    std::vector<index_t> distance(static_cast<std::size_t>(plan.keys()), -1), front{query}, next;
    std::vector<bool> expanded(static_cast<std::size_t>(plan.keys()), false);
    expanded[static_cast<std::size_t>(query)] = true;
    for (index_t hop = 1; !front.empty(); ++hop) {
        next.clear();
        for (const index_t i : front)
            plan.for_each_key(i, [&](index_t j) {
                const auto at = static_cast<std::size_t>(j);
                if (distance[at] >= 0) return;
                distance[at] = hop;
                if (!expanded[at]) {
                    expanded[at] = true;
                    next.push_back(j);
                }
            });
        std::swap(front, next);
    }
    return distance;
}

/// Share of all tokens that a query sees within 1 .. hops hops (itself counted), averaged over the given queries, all if none
/// are given. O(queries x pairs).
inline std::vector<double> receptive_field(const Plan& plan, int hops, std::vector<index_t> queries = {}) {
    detail::require(hops >= 1, "hops", "a number >= 1", hops);
    detail::require(plan.queries() >= 1, "plan", "at least one query", plan.queries());
    if (queries.empty()) {
        queries.resize(static_cast<std::size_t>(plan.queries()));
        std::iota(queries.begin(), queries.end(), 0);
    }
    std::vector<double> share(static_cast<std::size_t>(hops), 0.);
    for (const index_t query : queries) {
        auto distance = hop_distances(plan, query);
        distance[static_cast<std::size_t>(query)] = 1;
        for (const index_t d : distance)
            for (index_t hop = std::max(d, index_t{1}); d > 0 && hop <= hops; ++hop) share[static_cast<std::size_t>(hop) - 1] += 1;
    }
    for (double& s : share) s /= double(queries.size()) * double(plan.keys());
    return share;
}

POLYATTN_END_NAMESPACE
