#pragma once

/// dloss() / dvalue from differences over two steps, extrapolated: the error falls with the fourth power of the step.
template <class Loss>
double derivative(double& value, Loss&& loss, double step = 1e-5) {
    const double start = value;
    const auto slope = [&](double h) {
        value = start + h;
        const double up = loss();
        value = start - h;
        const double down = loss();
        value = start;
        return (up - down) / (2 * h);
    };
    return (4 * slope(step / 2) - slope(step)) / 3;
}
