#pragma once
// Training and inference with SSA ("The information pathways hypothesis", KDD 2023): which layers sample, when they stop, and ensembles.

#include <polyattn/nn/pass.hpp>
#include <polyattn/policy/sampler/sampler.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// Layers [first, last).
struct LayerRange {
    index_t first = 0, last = std::numeric_limits<index_t>::max();
    static LayerRange last_of(index_t count, index_t layers) {
        detail::require(count >= 0 && count <= layers, "count", [&] { return detail::text("a number of layers from 0 to ", layers); }, count);
        return {layers - count, layers};
    }
    bool contains(index_t layer) const { return layer >= first && layer < last; }
};

/// The layers whose entry is true; those behind the last entry are not.
struct LayerMask {
    std::vector<bool> layers;
    bool contains(index_t layer) const { return layer >= 0 && static_cast<std::size_t>(layer) < layers.size() && layers[static_cast<std::size_t>(layer)]; }
};

/// In the layers of a range or mask attention sees what pattern and sampler leave, a fresh draw for each layer, step and sample; other layers keep
/// their own attention, which must have the same bias and diffusion, and the same pattern without sampler. The paper's S12-L4 of 16 layers
/// is subsampled(Causal{}, LocallyBiased<4>{...}, LayerRange::last_of(12, 16)), its W14-S10 leaves out the last two: LayerRange{4, 14}.
template <SparsityPattern Pattern, SamplerPolicy Sampler, class Layers = LayerRange>
PlanSource subsampled(Pattern pattern, Sampler sampler, Layers layers = {}) {
    static_assert(!DataDependentPattern<Pattern>, "polyattn: subsampled() draws plans before q and k are known; give this pattern to the layers' Attention instead");
    const polyattn::Attention<Pattern, Sampler> checked{pattern, sampler};  // throws or fails to compile where they don't fit
    return [=](const LayerCall& call) -> std::vector<Plan> {
        if (!layers.contains(call.layer)) return {};
        return checked.plans(call.batch, call.tokens, call.tokens, {.key_lengths = {call.lengths.begin(), call.lengths.end()}, .draw = call.draw});
    };
}

/// Sampled training with dense fine-tuning: the plans of step `step` of `steps`. Source: KDD 2023, section 4: the last tenth is dense.
struct SubsampledTraining {
    PlanSource sampled;
    double fine_tuned = .1;

    void validate() const { detail::require_in_range(fine_tuned, 0, 1, "fine_tuned", "a share of the steps from 0 to 1"); }
    bool samples_at(std::int64_t step, std::int64_t steps) const {
        validate();
        return double(step) < (1 - fine_tuned) * double(steps);
    }
    PlanSource at(std::int64_t step, std::int64_t steps) const { return samples_at(step, steps) ? sampled : PlanSource{}; }
};

/// Mean and variance over samples: of probabilities for classes and tokens (never of logits), of values for regression. Samples may be
/// added in one program or collected in several and merged; equal orders give equal bits.
class SelfEnsemble {
public:
    SelfEnsemble() = default;
    /// The samples(), mean() and squares() of an ensemble that another process collected. Throws invalid_input if they do not fit.
    SelfEnsemble(std::int64_t samples, std::vector<double> mean, std::vector<double> squares) : count_(samples), mean_(std::move(mean)), squares_(std::move(squares)) {
        detail::require(samples >= 0, "samples", "a number >= 0", samples);
        detail::require(squares_.size() == mean_.size(), "squares", [&] { return detail::text(mean_.size(), " numbers"); }, squares_.size());
        for (const double square : squares_) detail::require(!(square < 0), "squares", "numbers >= 0", square);
    }

    template <class T>
    void add(std::span<const T> values) {
        if (count_ == 0) {
            mean_.assign(values.size(), 0);
            squares_.assign(values.size(), 0);
        }
        detail::require(values.size() == mean_.size(), "values", [&] { return detail::text(mean_.size(), " as before"); }, values.size());
        ++count_;
        for (std::size_t i = 0; i < values.size(); ++i) {  // Welford
            const double apart = double(values[i]) - mean_[i];
            mean_[i] += apart / double(count_);
            squares_[i] += apart * (double(values[i]) - mean_[i]);
        }
    }
    void merge(const SelfEnsemble& other) {
        if (other.count_ == 0) return;
        if (count_ == 0) {
            *this = other;
            return;
        }
        detail::require(other.mean_.size() == mean_.size(), "other", [&] { return detail::text(mean_.size(), " values"); }, other.mean_.size());
        const double all = double(count_) + double(other.count_);
        for (std::size_t i = 0; i < mean_.size(); ++i) {
            const double apart = other.mean_[i] - mean_[i];
            mean_[i] += apart * double(other.count_) / all;
            squares_[i] += other.squares_[i] + apart * apart * double(count_) * double(other.count_) / all;
        }
        count_ += other.count_;
    }

    std::int64_t samples() const { return count_; }
    std::span<const double> mean() const { return mean_; }
    /// Summed squares of what samples are away from the mean.
    std::span<const double> squares() const { return squares_; }
    /// Unbiased, of one sample; that of the mean is smaller by the number of samples. Empty below two.
    std::vector<double> variance() const {
        if (count_ < 2) return {};
        std::vector<double> variance = squares_;
        for (double& value : variance) value /= double(count_ - 1);
        return variance;
    }

private:
    std::int64_t count_ = 0;
    std::vector<double> mean_, squares_;
};

/// Cuts a long text into windows of up to `length` tokens that move on by `stride`: f(first, last, counted) for tokens [first, last), of which
/// those from `counted` on were in no window before. Every token counts once; all but the first window's have at least length - stride
/// tokens in front of them.
template <class F>
void sliding_windows(offset_t tokens, index_t length, index_t stride, F&& f) {
    detail::require(length >= 1, "length", "a number of tokens >= 1", length);
    detail::require(stride >= 1 && stride <= length, "stride", [&] { return detail::text("a number of tokens from 1 to ", length); }, stride);
    for (offset_t counted = 0; counted < tokens;) {
        const offset_t last = std::min(tokens, counted == 0 ? offset_t{length} : counted + stride);
        f(std::max<offset_t>(0, last - length), last, counted);
        counted = last;
    }
}

}  // namespace nn

POLYATTN_END_NAMESPACE
