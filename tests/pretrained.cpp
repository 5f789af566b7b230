// An encoder whose weights and outputs come from elsewhere: read from its file, and run within the bounds of its arithmetic.
#include "../examples/bert.hpp"

#include <doctest/doctest.h>

#include <numbers>

using namespace polyattn;

namespace {

const std::filesystem::path path = std::filesystem::path(POLYATTN_TEST_DATA) / "tiny_bert.safetensors";

/// A number of a computation that remembers what it came from, its derivatives by that, and how far off its own operation may be: an output is off by at most the sum of all
/// operations' errors, each times the output's derivative by its result, but for products of such errors. (Bounds of single operations grow a thousandfold with each norm.)
class Traced {
public:
    explicit Traced(double v = 0, double error = 0) : Traced(v, error, {}) {}
    double value() const { return value_; }

    friend Traced operator+(Traced a, Traced b) { return {a.value_ + b.value_, unit * std::abs(a.value_ + b.value_), {{a.at_, 1}, {b.at_, 1}}}; }
    friend Traced operator-(Traced a, Traced b) { return {a.value_ - b.value_, unit * std::abs(a.value_ - b.value_), {{a.at_, 1}, {b.at_, -1}}}; }
    friend Traced operator*(Traced a, Traced b) { return {a.value_ * b.value_, unit * std::abs(a.value_ * b.value_), {{a.at_, b.value_}, {b.at_, a.value_}}}; }
    /// f(a), off by `error` beside what a is off by.
    friend Traced of(Traced a, double f, double slope, double error) { return {f, error, {{a.at_, slope}}}; }
    /// In any order.
    static Traced sum(std::span<const Traced> terms) {
        double total = 0, sizes = 0;
        std::vector<Parent> parents;
        for (const Traced& term : terms) {
            total += term.value_;
            sizes += std::abs(term.value_);
            parents.push_back({term.at_, 1});
        }
        return {total, unit * double(terms.size()) * sizes, std::move(parents)};
    }
    double bound() const {
        std::vector<double> derivatives(at_ + 1);
        derivatives[at_] = 1;
        double total = 0;
        for (std::size_t i = at_ + 1; i-- > 0;) {
            total += std::abs(derivatives[i]) * all[i].error;
            for (const auto& [parent, slope] : all[i].parents) derivatives[parent] += derivatives[i] * slope;
        }
        return total;
    }

    static inline double unit;  // roundoff of the tested numbers
    static void start(double of_numbers) {
        unit = of_numbers;
        all.clear();
    }

private:
    struct Parent {
        std::size_t at;
        double slope;
    };
    struct Operation {
        double error;
        std::vector<Parent> parents;
    };
    static inline std::vector<Operation> all;
    Traced(double v, double error, std::vector<Parent> parents) : at_(all.size()), value_(v) { all.push_back({error, std::move(parents)}); }
    std::size_t at_;
    double value_;
};

/// Its error is that of detail::Normal.
Traced gelu(Traced a) {
    const double x = a.value(), share = .5 * (1 + std::erf(x / std::numbers::sqrt2)), density = std::exp(-x * x / 2) * std::numbers::inv_sqrtpi / std::numbers::sqrt2;
    return of(a, x * share, share + x * density, (1.25 * x * x + 17) * Traced::unit * std::abs(x * share));
}
Traced inverse(Traced a) { return of(a, 1 / a.value(), -1 / (a.value() * a.value()), Traced::unit / a.value()); }
Traced root(Traced a) { return of(a, std::sqrt(a.value()), .5 / std::sqrt(a.value()), Traced::unit * std::sqrt(a.value())); }

struct Matrix {
    Matrix(index_t r, index_t c) : rows(r), columns(c), entries(static_cast<std::size_t>(r * c)) {}
    Traced& operator()(index_t r, index_t c) { return entries[static_cast<std::size_t>(r * columns + c)]; }
    const Traced& operator()(index_t r, index_t c) const { return entries[static_cast<std::size_t>(r * columns + c)]; }
    index_t rows, columns;
    std::vector<Traced> entries;
};

/// BERT's encoder (Devlin et al., 2019) from the file's tensors, rounded once if the tested numbers are shorter.
class TracedEncoder {
public:
    Matrix operator()(const std::vector<index_t>& tokens, index_t layers, index_t heads) const {
        const Matrix words = read("embeddings.word_embeddings.weight"), positions = read("embeddings.position_embeddings.weight"), segments = read("embeddings.token_type_embeddings.weight");
        Matrix x(static_cast<index_t>(tokens.size()), words.columns);
        for (index_t i = 0; i < x.rows; ++i)
            for (index_t c = 0; c < x.columns; ++c) x(i, c) = words(tokens[static_cast<std::size_t>(i)], c) + (positions(i, c) + segments(0, c));
        norm("embeddings.LayerNorm", x);
        for (index_t layer = 0; layer < layers; ++layer) {
            const std::string name = "encoder.layer." + std::to_string(layer) + ".";
            const Matrix context = attend(linear(name + "attention.self.query", x), linear(name + "attention.self.key", x), linear(name + "attention.self.value", x), heads);
            add(x, linear(name + "attention.output.dense", context));
            norm(name + "attention.output.LayerNorm", x);
            Matrix hidden = linear(name + "intermediate.dense", x);
            for (Traced& entry : hidden.entries) entry = gelu(entry);
            add(x, linear(name + "output.dense", hidden));
            norm(name + "output.LayerNorm", x);
        }
        return x;
    }

private:
    Matrix read(const std::string& name) const {
        const Tensor<double>& from = file_.at("bert." + name);
        Matrix made(static_cast<index_t>(from.shape[0]), from.shape.size() < 2 ? 1 : static_cast<index_t>(from.shape[1]));
        for (std::size_t i = 0; i < made.entries.size(); ++i) made.entries[i] = Traced(from.values[i], Traced::unit > 0x1p-53 ? Traced::unit * std::abs(from.values[i]) : 0);
        return made;
    }
    Matrix linear(const std::string& name, const Matrix& x) const {
        const Matrix weight = read(name + ".weight"), bias = read(name + ".bias");
        Matrix made(x.rows, weight.rows);
        for (index_t i = 0; i < made.rows; ++i)
            for (index_t c = 0; c < made.columns; ++c) {
                std::vector<Traced> terms{bias(c, 0)};
                for (index_t k = 0; k < x.columns; ++k) terms.push_back(x(i, k) * weight(c, k));
                made(i, c) = Traced::sum(terms);
            }
        return made;
    }
    static void add(Matrix& to, const Matrix& from) {
        for (std::size_t i = 0; i < to.entries.size(); ++i) to.entries[i] = to.entries[i] + from.entries[i];
    }
    /// Weights as 2^(score - largest), within 4 units beside the exponent's, and rescaled a few times.
    static Matrix attend(const Matrix& q, const Matrix& k, const Matrix& v, index_t heads) {
        Matrix made(q.rows, v.columns);
        const index_t dim = q.columns / heads;
        for (index_t h = 0; h < heads; ++h)
            for (index_t i = 0; i < q.rows; ++i) {
                std::vector<Traced> weights;
                double most = -1e300;
                for (index_t j = 0; j < k.rows; ++j) {
                    std::vector<Traced> terms;
                    for (index_t c = h * dim; c < (h + 1) * dim; ++c) terms.push_back(q(i, c) * k(j, c));
                    weights.push_back(Traced::sum(terms) * Traced(1 / std::sqrt(double(dim)), Traced::unit));
                    most = std::max(most, weights.back().value());
                }
                for (Traced& weight : weights) {
                    const double power = std::exp(weight.value() - most);
                    weight = of(weight, power, power, 4 * Traced::unit * (4 + std::abs(most) + std::abs(weight.value())) * power);
                }
                const Traced scale = inverse(Traced::sum(weights));
                for (index_t c = h * dim; c < (h + 1) * dim; ++c) {
                    std::vector<Traced> terms;
                    for (index_t j = 0; j < k.rows; ++j) terms.push_back(weights[static_cast<std::size_t>(j)] * v(j, c));
                    made(i, c) = Traced::sum(terms) * scale;
                }
            }
        return made;
    }
    void norm(const std::string& name, Matrix& x) const {
        const Matrix weight = read(name + ".weight"), bias = read(name + ".bias");
        const Traced share(1. / x.columns, Traced::unit / x.columns);
        for (index_t i = 0; i < x.rows; ++i) {
            Traced* row = &x(i, 0);
            const auto columns = static_cast<std::size_t>(x.columns);
            const Traced mean = Traced::sum({row, columns}) * share;
            std::vector<Traced> squares;
            for (index_t c = 0; c < x.columns; ++c) {
                row[c] = row[c] - mean;
                squares.push_back(row[c] * row[c]);
            }
            const Traced scale = inverse(root(Traced::sum(squares) * share + Traced(1e-12)));
            for (index_t c = 0; c < x.columns; ++c) row[c] = row[c] * scale * weight(c, 0) + bias(c, 0);
        }
    }

    nn::TensorFile<double> file_ = nn::TensorFile<double>::read(path);
};

}  // namespace

TEST_CASE_TEMPLATE("a pretrained encoder of someone else: the outputs that numpy computed", T, float, double) {
    Traced::start(sizeof(T) == 4 ? 0x1p-24 : 0x1p-53);
    const auto file = nn::TensorFile<double>::read(path);
    const TracedEncoder exact;
    const auto encoder = read_bert<T>(path, 2);
    const auto sparse = read_bert<T>(path, 2, Attention{SlidingWindow{.window = 14}});  // wide enough to be dense
    typename std::remove_const_t<decltype(encoder)>::Saved saved;
    typename std::remove_const_t<decltype(sparse)>::Saved sparse_saved;
    Workspace workspace;
    double loosest = 0;
    const auto check = [&](const MatrixView<const T>& features, const Matrix& traced, const Tensor<double>& wanted, const char* what) {
        REQUIRE(features.rows == wanted.shape[0]);
        for (index_t i = 0; i < features.rows; ++i)
            for (index_t c = 0; c < features.cols; ++c) {
                // numpy's own numbers are off as much as a computation in double.
                const double bound = 1.01 * traced(i, c).bound() * (1 + 0x1p-53 / Traced::unit), apart = std::abs(double(features(i, c)) - wanted.values[static_cast<std::size_t>(i * features.cols + c)]);
                INFO(what, ", row ", i, ", column ", c);
                CHECK(apart <= bound);
                loosest = std::max(loosest, bound / Traced::unit);
            }
    };
    std::vector<Matrix> traced;
    for (const std::string number : {"0", "1"}) {
        const Tensor<double>& input = file.at("input." + number);
        const std::vector<index_t> tokens(input.values.begin(), input.values.end());
        traced.push_back(exact(tokens, 2, 2));
        check(encoder.forward(tokens, 1, saved, {.workspace = &workspace}), traced.back(), file.at("output." + number), "dense");
        check(sparse.forward(tokens, 1, sparse_saved, {.workspace = &workspace}), traced.back(), file.at("output." + number), "a window");
    }
    // Both as one padded batch.
    const std::vector<index_t> both{1, 4, 9, 4, 0, 10, 7, 3, 0, 0, 0, 0, 0, 0};
    const auto features = encoder.forward(both, 2, saved, {.workspace = &workspace, .lengths = {7, 1}});
    check({features.data, 7, features.cols, features.row_stride, 1}, traced[0], file.at("output.0"), "padded");
    check({features.row(7), 1, features.cols, features.row_stride, 1}, traced[1], file.at("output.1"), "alone");
    CHECK(loosest < 1e4);  // units: the bounds say something
}

TEST_CASE("files that do not fit") {
    CHECK_THROWS_AS(read_bert<double>(path, 3), invalid_input);  // heads that do not divide
    auto broken = nn::TensorFile<double>::read(path);
    CHECK_THROWS_AS(broken.stack("all", {}), invalid_input);
    CHECK_THROWS_AS(broken.stack("all", {"bert.embeddings.LayerNorm.weight", "output.0"}), invalid_input);
    CHECK_THROWS_AS(broken.stack("all", {"output.0", "bert.encoder.layer.0.intermediate.dense.bias"}), invalid_input);
    broken.stack("all", {"output.0", "output.1"});
    CHECK(broken.at("all").shape == std::vector<offset_t>{8, 8});
}
