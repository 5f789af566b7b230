#pragma once
// All eigenvalues of small plans, by Eigen. Not in the umbrella header: includes <Eigen/Eigenvalues>.

#include <polyattn/analysis/spectrum.hpp>

#include <Eigen/Eigenvalues>

POLYATTN_BEGIN_NAMESPACE

/// The uniform walk as a dense matrix.
inline Eigen::MatrixXd walk_matrix(const Plan& plan) {
    const UniformWalk walk(plan);
    const auto n = static_cast<Eigen::Index>(walk.tokens());
    Eigen::MatrixXd a = Eigen::MatrixXd::Zero(n, n);
    for (std::size_t i = 0; i < walk.tokens(); ++i)
        for (offset_t e = walk.csr().offsets[i]; e < walk.csr().offsets[i + 1]; ++e)
            a(static_cast<Eigen::Index>(i), walk.csr().keys[static_cast<std::size_t>(e)]) = 1. / double(walk.degree(i));
    return a;
}

/// Eigenvalues of the uniform walk, by descending magnitude; the first is 1. O(n^3).
inline std::vector<std::complex<double>> spectrum(const Plan& plan) {
    const Eigen::EigenSolver<Eigen::MatrixXd> solver(walk_matrix(plan), false);
    std::vector<std::complex<double>> values(solver.eigenvalues().begin(), solver.eigenvalues().end());
    std::sort(values.begin(), values.end(), [](const auto& a, const auto& b) { return std::abs(a) > std::abs(b); });
    return values;
}

POLYATTN_END_NAMESPACE
