#pragma once
// Line charts as SVG: enough for loss curves.

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <string>
#include <utility>
#include <vector>

struct Curve {
    std::string name;
    std::vector<std::pair<double, double>> points;
};

/// Throws std::runtime_error if the file can't be written.
inline void write_chart(const std::string& path, const std::string& x_name, const std::string& y_name, const std::vector<Curve>& curves) {
    const double width = 760, height = 420, left = 60, top = 20, right = 200, bottom = 50, infinity = std::numeric_limits<double>::infinity();
    double x_low = infinity, x_high = -infinity, y_low = infinity, y_high = -infinity;
    for (const Curve& curve : curves)
        for (const auto& [x, y] : curve.points) {
            x_low = std::min(x_low, x);
            x_high = std::max(x_high, x);
            y_low = std::min(y_low, y);
            y_high = std::max(y_high, y);
        }
    if (!(x_high > x_low)) x_high = x_low + 1;
    if (!(y_high > y_low)) y_high = y_low + 1;
    const auto place = [&](double x, double y) {
        return std::pair{left + (x - x_low) / (x_high - x_low) * (width - left - right), height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)};
    };
    const auto number = [](double value) {
        char text[32];
        std::snprintf(text, sizeof text, "%.3g", value);
        return std::string(text);
    };
    std::ofstream out(path);
    out << "<svg xmlns='http://www.w3.org/2000/svg' width='" << width << "' height='" << height << "' font-family='sans-serif' font-size='12'>\n<rect width='100%' height='100%' fill='white'/>\n";
    for (int tick = 0; tick <= 4; ++tick) {
        const double x = x_low + (x_high - x_low) * tick / 4, y = y_low + (y_high - y_low) * tick / 4;
        const auto [px, py] = place(x, y);
        out << "<line x1='" << left << "' x2='" << width - right << "' y1='" << py << "' y2='" << py << "' stroke='#ddd'/>"
            << "<text x='" << left - 6 << "' y='" << py + 4 << "' text-anchor='end'>" << number(y) << "</text>"
            << "<text x='" << px << "' y='" << height - bottom + 18 << "' text-anchor='middle'>" << number(x) << "</text>\n";
    }
    out << "<text x='" << (left + width - right) / 2 << "' y='" << height - 12 << "' text-anchor='middle'>" << x_name << "</text><text x='14' y='" << height / 2
        << "' text-anchor='middle' transform='rotate(-90 14 " << height / 2 << ")'>" << y_name << "</text>\n";
    const char* const colours[] = {"#000", "#e41a1c", "#377eb8", "#4daf4a", "#984ea3", "#ff7f00", "#a65628", "#f781bf", "#999", "#17becf", "#bcbd22", "#006d2c"};
    for (std::size_t c = 0; c < curves.size(); ++c) {
        const std::string colour = colours[c % std::size(colours)];
        out << "<polyline fill='none' stroke-width='1.5' stroke='" << colour << "' points='";
        for (const auto& [x, y] : curves[c].points) {
            const auto [px, py] = place(x, y);
            out << number(px) << "," << number(py) << " ";
        }
        const double y = top + 16 * double(c + 1);
        out << "'/>\n<line x1='" << width - right + 12 << "' x2='" << width - right + 32 << "' y1='" << y - 4 << "' y2='" << y - 4 << "' stroke-width='2' stroke='" << colour << "'/><text x='"
            << width - right + 38 << "' y='" << y << "'>" << curves[c].name << "</text>\n";
    }
    out << "</svg>\n";
    if (!out) throw std::runtime_error("can't write " + path);
}
