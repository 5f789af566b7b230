#pragma once

#include <polyattn/core/config.hpp>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

POLYATTN_BEGIN_NAMESPACE

namespace detail {

inline constexpr std::size_t huge_page = std::size_t{2} << 20;

/// Asks for huge pages where whole ones lie in `bytes` of memory that nobody has written to yet: matrices touch more pages than the CPU keeps
/// translations of. Changes no values, and does nothing elsewhere than on Linux.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
    const auto at = reinterpret_cast<std::uintptr_t>(memory), begin = (at + huge_page - 1) / huge_page * huge_page, end = (at + bytes) / huge_page * huge_page;
    if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace detail

/// Memory that starts with a line of the caches, as vectors are loaded fastest from there, and from 2 MiB on with a huge page.
template <class T>
struct AlignedAllocator {
    using value_type = T;

    AlignedAllocator() = default;
    template <class U>
    AlignedAllocator(const AlignedAllocator<U>&) noexcept {}

    T* allocate(std::size_t count) {
        const std::size_t bytes = count * sizeof(T);
        void* const memory = ::operator new(bytes, alignment(count));
        if (bytes >= detail::huge_page) detail::prefer_huge_pages(memory, bytes);
        return static_cast<T*>(memory);
    }
    void deallocate(T* memory, std::size_t count) noexcept { ::operator delete(memory, alignment(count)); }
    friend bool operator==(AlignedAllocator, AlignedAllocator) { return true; }

private:
    static std::align_val_t alignment(std::size_t count) { return std::align_val_t{count * sizeof(T) >= detail::huge_page ? detail::huge_page : 64}; }
};

/// A vector of values as Tensor keeps them.
template <class T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

POLYATTN_END_NAMESPACE
