// Which attention learns what: two-layer models with every kind of it on three generated tasks.
//   listops [--task listops|paths|digits] [--setting tiny|quick|full|paper] [--sweep models|rates|diffusion|tokens] [--steps N] [--seeds N] [--test N]
//           [--folder FOLDER] [--seed N]
// listops: nested operations on digits, [MAX 4 [MIN 2 9 ] 7 ], by the rules of Nangia and Bowman, "ListOps" (2018); paths: are two marked points of
// a picture on one path (after Linsley et al., Pathfinder); digits: 8 x 8 pixels. Prints one table; a run that is in FOLDER is not repeated.
// `full` takes some hours, `quick` some minutes; `paper` has expressions of 500 to 2000 tokens as Long Range Arena has them, and takes days.
#include "attention_zoo.hpp"
#include "digits.hpp"
#include "experiment.hpp"

using namespace polyattn;

namespace {

// --- tasks ---

constexpr std::uint32_t listops_stream = 2001, paths_stream = 2002, digits_stream = 2003, batch_stream = 2004;

/// [MIN, [MAX, [MED, [SM are 10 .. 13, ] is 14. A number with probability 3/4, else an operation on 2 .. most_arguments expressions; numbers only
/// at the greatest depth. Expressions that are too long or too short are drawn again.
struct ListOps {
    index_t most_depth, most_arguments, shortest, longest;

    Item operator()(std::uint64_t seed, std::uint32_t number) const {
        RandomRow random(seed, number, listops_stream);
        for (;;) {
            Item item;
            item.label = expression(random, 1, true, item.tokens);
            const auto length = static_cast<index_t>(item.tokens.size());
            if (length >= shortest && length <= longest) return item;
        }
    }

private:
    index_t expression(RandomRow& random, index_t depth, bool operation, std::vector<index_t>& tokens) const {
        if (!operation && (depth >= most_depth || random.below(4) != 0 || static_cast<index_t>(tokens.size()) > longest)) {
            tokens.push_back(static_cast<index_t>(random.below(10)));
            return tokens.back();
        }
        const auto kind = static_cast<index_t>(random.below(4)), count = 2 + static_cast<index_t>(random.below(static_cast<std::uint32_t>(most_arguments - 1)));
        tokens.push_back(10 + kind);
        std::vector<index_t> values;
        for (index_t a = 0; a < count; ++a) values.push_back(expression(random, depth + 1, false, tokens));
        tokens.push_back(14);
        std::sort(values.begin(), values.end());
        const auto n = values.size();
        if (kind == 0) return values.front();
        if (kind == 1) return values.back();
        if (kind == 2) return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
        return std::accumulate(values.begin(), values.end(), index_t{0}) % 10;
    }
};

/// A picture of `side` x `side` pixels with some winding paths; two ends are marked, of one path or of two.
struct Paths {
    index_t side, paths, length;

    Item operator()(std::uint64_t seed, std::uint32_t number) const {
        RandomRow random(seed, number, paths_stream);
        for (;;) {
            Item item{std::vector<index_t>(static_cast<std::size_t>(side * side), 0), static_cast<index_t>(random.below(2))};
            std::vector<std::pair<index_t, index_t>> ends;
            for (index_t p = 0; p < paths; ++p) {
                const std::vector<index_t> walked = walk(random, item.tokens);
                if (walked.empty()) break;
                for (const index_t at : walked) item.tokens[static_cast<std::size_t>(at)] = 1;
                ends.emplace_back(walked.front(), walked.back());
            }
            if (static_cast<index_t>(ends.size()) < paths) continue;
            item.tokens[static_cast<std::size_t>(ends[0].first)] = 2;
            item.tokens[static_cast<std::size_t>(item.label ? ends[0].second : ends[1].second)] = 2;
            return item;
        }
    }

private:
    /// A walk that touches neither itself nor another path; empty if it runs into a corner.
    std::vector<index_t> walk(RandomRow& random, const std::vector<index_t>& taken) const {
        const auto free = [&](index_t x, index_t y, const std::vector<index_t>& own) {
            if (x < 0 || y < 0 || x >= side || y >= side) return false;
            for (index_t dy = -1; dy <= 1; ++dy)
                for (index_t dx = -1; dx <= 1; ++dx) {
                    const index_t nx = x + dx, ny = y + dy;
                    if (nx >= 0 && ny >= 0 && nx < side && ny < side && taken[static_cast<std::size_t>(ny * side + nx)]) return false;
                }
            return std::find(own.begin(), own.end(), y * side + x) == own.end();
        };
        index_t x = static_cast<index_t>(random.below(static_cast<std::uint32_t>(side))), y = static_cast<index_t>(random.below(static_cast<std::uint32_t>(side)));
        std::vector<index_t> own;
        if (!free(x, y, own)) return {};
        own.push_back(y * side + x);
        std::uint32_t direction = random.below(4);
        for (index_t tries = 0; static_cast<index_t>(own.size()) < length && tries < 8 * length; ++tries) {
            if (random.below(3) == 0) direction = (direction + 1 + 2 * random.below(2)) % 4;
            const index_t nx = x + (direction == 0) - (direction == 2), ny = y + (direction == 1) - (direction == 3);
            if (!free(nx, ny, own)) {
                direction = random.below(4);
                continue;
            }
            x = nx, y = ny;
            own.push_back(y * side + x);
        }
        return static_cast<index_t>(own.size()) == length ? own : std::vector<index_t>();
    }
};

/// Numbers with the first bit set are held out.
Task digits_task() {
    const auto digits = std::make_shared<const std::pair<Digits, Digits>>(read_digits());
    return {17, 10, 64, static_cast<int>(digits->second.count()), [digits](std::uint64_t seed, std::uint32_t number) {
                const bool held_out = number >> 31;
                const Digits& from = held_out ? digits->second : digits->first;
                const std::size_t at = held_out ? (number & 0x7fffffff) % from.count() : RandomRow(seed, number, digits_stream).below(static_cast<std::uint32_t>(from.count()));
                const auto first = from.pixels.begin() + static_cast<std::ptrdiff_t>(at) * 64;
                return Item{{first, first + 64}, from.labels[at]};
            }};
}

// --- what runs ---

struct Settings : Training {
    std::string task = "listops", setting = "quick", sweep = "models", shape;
    ListOps listops{3, 4, 4, 32};
    Paths paths{12, 3, 10};

    Settings() { folder = "listops_runs"; }

    void choose(const std::string& name) {
        setting = name;
        if (name == "tiny") steps = 2, test = 64, listops = {2, 3, 4, 16}, paths = {8, 2, 5}, batch = 8;
        else if (name == "full") steps = 3000, seeds = 3, test = 20000, batch = 32, listops = {4, 8, 48, 128}, paths = {16, 4, 14};
        else if (name == "paper") steps = 5000, seeds = 3, test = 20000, batch = 32, listops = {10, 10, 500, 2000}, paths = {32, 6, 30};
        else if (name != "quick") throw std::runtime_error("--setting must be tiny, quick, full or paper");
    }
    /// Other lengths and depths than the setting's; the runs are kept apart.
    bool set(const std::string& option, const std::string& value) {
        if (option == "--depth") listops.most_depth = number_of(option, value, 1);
        else if (option == "--arguments") listops.most_arguments = number_of(option, value, 2);
        else if (option == "--shortest") listops.shortest = number_of(option, value, 1);
        else if (option == "--longest") listops.longest = number_of(option, value, 4);
        else return Training::set(option, value);
        shape = '-' + std::to_string(listops.most_depth) + '-' + std::to_string(listops.most_arguments) + '-' + std::to_string(listops.shortest);
        return true;
    }
    Task make_task() const {
        if (task == "listops" && listops.shortest > listops.longest) throw std::runtime_error("--shortest must be at most --longest");
        if (task == "listops") return {15, 10, listops.longest, 0, listops};
        if (task == "paths") return {3, 2, paths.side * paths.side, 0, paths};
        if (task == "digits") return digits_task();
        throw std::runtime_error("--task must be listops, paths or digits");
    }
};

template <index_t... L>
std::string rate_text() {
    std::string text;
    ((text += (text.empty() ? "1/" : ", 1/") + std::to_string(L)), ...);
    return text;
}

int run(const Settings& s) {
    const Task task = s.make_task();
    s.announce(s.task, task);
    Runs runs(s.folder);
    std::vector<Row> rows;
    const auto add = [&](const std::string& name, const auto& attention) {
        using Model = nn::Classifier<float, std::remove_cvref_t<decltype(attention)>>;
        rows.push_back(run_seeds(runs, s, s.task + '/' + s.setting + s.shape + '/' + s.sweep + '/', name, task, [&](const nn::TransformerOptions& options) {
            return Model(attention, task.vocabulary, task.classes, options, task.tokens);
        }));
    };
    const ZooSizes sizes = ZooSizes::of(task.tokens);
    const auto rates = [&]<index_t... L>(std::integer_sequence<index_t, L...>) { add("AdaMRA " + rate_text<L...>(), MultiResolution<SegmentMeans<L...>>{}); };
    if (s.sweep == "models") {
        for_each_pattern(sizes, add);
        for_each_linear(sizes, add);
        using Accurate = SegmentMeans<2, 8, 32>;
        add("AdaMRA 1/2, 1/8, 1/32", MultiResolution<Accurate>{});
        add("AdaMRA, random router", MultiResolution<Accurate, RandomRoute>{.router = {.seed = s.seed}});
        add("AdaMRA, softmax", MultiResolution<Accurate, TopOne<StraightThrough>, Softmax>{});
        add("AdaMRA, elu + 1", MultiResolution<Accurate, TopOne<StraightThrough>, Kernel<EluPlusOne>>{});
        add("AdaMRA, all resolutions", MultiResolution<Accurate, ConcatenateAll>{});
    } else if (s.sweep == "rates") {
        rates(std::integer_sequence<index_t, 2, 8, 32>{});
        rates(std::integer_sequence<index_t, 2, 4, 8>{});
        rates(std::integer_sequence<index_t, 4, 8, 16>{});
        rates(std::integer_sequence<index_t, 8, 16, 32>{});
        rates(std::integer_sequence<index_t, 2, 4, 8, 16>{});
        rates(std::integer_sequence<index_t, 2, 8>{});
        rates(std::integer_sequence<index_t, 2, 32>{});
        rates(std::integer_sequence<index_t, 8, 32>{});
        rates(std::integer_sequence<index_t, 2>{});
        rates(std::integer_sequence<index_t, 8>{});
    } else if (s.sweep == "diffusion") {
        const LocalGlobalRandom pattern{.window = sizes.window, .globals = sizes.globals, .randoms = sizes.randoms};
        for (const int hops : {1, 2, 3, 5, 7}) add("alpha .1, K = " + std::to_string(hops), Patterned{AnyPattern{[=](index_t q, index_t k) { return pattern.plan(q, k); }}, AnyDiffusion{{1, std::vector<Hop>(static_cast<std::size_t>(hops), Hop{.9, .1})}}});
        for (const int tenths : {0, 1, 2, 4, 6}) add("K = 5, alpha ." + std::to_string(tenths), patterned(pattern, PPR<5>{.alpha = tenths / 10.}));
    } else if (s.sweep == "tokens") {
        for (const index_t factor : {1, 2, 4}) {
            add("window x " + std::to_string(factor), patterned(LocalGlobalRandom{.window = factor * sizes.window, .globals = sizes.globals, .randoms = sizes.randoms}, PPR<5>{}));
            add("global x " + std::to_string(factor), patterned(LocalGlobalRandom{.window = sizes.window, .globals = factor * sizes.globals, .randoms = sizes.randoms}, PPR<5>{}));
            add("random x " + std::to_string(factor), patterned(LocalGlobalRandom{.window = sizes.window, .globals = sizes.globals, .randoms = factor * sizes.randoms}, PPR<5>{}));
        }
        add("uniform instead of random", patterned(Union{SlidingWindow{.window = sizes.window}, GlobalTokens{.count = sizes.globals}, UniformTokens{.count = sizes.randoms}}, PPR<5>{}));
    } else throw std::runtime_error("--sweep must be models, rates, diffusion or tokens");
    print(rows);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    Settings settings;
    return run_program(
        "listops", argc, argv,
        [&](const std::string& option, const std::string& value) {
            if (option == "--setting") settings.choose(value);  // what other options then change
            else if (option == "--task") settings.task = value;
            else if (option == "--sweep") settings.sweep = value;
            else return settings.set(option, value);
            return true;
        },
        [&] {
            // Where there are few, each is tested once.
            if (const int most = settings.make_task().held_out; most > 0) settings.test = std::min(settings.test, most);
            return run(settings);
        },
        "--setting");
}
