#pragma once

#include <polyattn/core/memory.hpp>
#include <polyattn/core/parallel.hpp>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <span>
#include <vector>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// A stack of scratch memory. take() hands out uninitialised, 64-byte aligned spans that live until release() of an earlier mark.
/// When the outermost mark is released all memory is joined to one block, so the same work again allocates nothing.
class Arena {
public:
    struct Mark {
        std::size_t block, used;
    };
    Mark mark() {
        ++depth_;
        return {block_, used_};
    }
    void release(Mark mark) noexcept {
        block_ = mark.block;
        used_ = mark.used;
        if (--depth_ == 0) join();
    }

    template <class T>
    std::span<T> take(offset_t count) {
        static_assert(std::is_trivially_copyable_v<T>);
        return {static_cast<T*>(bytes(static_cast<std::size_t>(count) * sizeof(T))), static_cast<std::size_t>(count)};
    }

    std::size_t capacity() const {
        std::size_t total = 0;
        for (const Block& block : blocks_) total += block.size;
        return total;
    }
    /// At least `size` bytes in one block. Only while nothing is taken.
    void reserve(std::size_t size) {
        if (size <= capacity()) return;
        blocks_.clear();
        blocks_.push_back(make_block(size));
    }

private:
    static constexpr std::size_t alignment = 64;
    struct Free {
        std::size_t alignment;
        void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{alignment}); }
    };
    struct Block {
        std::unique_ptr<std::byte, Free> memory;
        std::size_t size = 0;
    };

    /// Large blocks are whole huge pages.
    static Block make_block(std::size_t size) {
        const bool huge = size >= 2 * huge_page;
        const std::size_t aligned = huge ? huge_page : alignment;
        if (huge) size = (size + huge_page - 1) / huge_page * huge_page;
        std::byte* const memory = static_cast<std::byte*>(::operator new(size, std::align_val_t{aligned}));
        if (huge) prefer_huge_pages(memory, size);
        return {std::unique_ptr<std::byte, Free>(memory, Free{aligned}), size};
    }

    void* bytes(std::size_t size) {
        size = (size + alignment - 1) / alignment * alignment;
        while (block_ < blocks_.size() && used_ + size > blocks_[block_].size) {
            ++block_;
            used_ = 0;
        }
        if (block_ == blocks_.size()) blocks_.push_back(make_block(std::max<std::size_t>(size, 4096)));
        void* at = blocks_[block_].memory.get() + used_;
        used_ += size;
        return at;
    }

    void join() noexcept {
        if (blocks_.size() < 2) return;
        const std::size_t total = capacity();
        blocks_.clear();
        try {
            blocks_.push_back(make_block(total));
        } catch (...) {
            blocks_.clear();  // the next call allocates anew
        }
    }

    std::vector<Block> blocks_;
    std::size_t block_ = 0, used_ = 0;
    int depth_ = 0;
};

}  // namespace detail

/// Scratch memory that outlives a call. Hand the same workspace (and plan) to repeated calls and they allocate nothing
/// after the first. Belongs to one call at a time.
class Workspace {
public:
    /// Bytes held at the moment.
    std::size_t capacity() const {
        std::size_t total = 0;
        for (const auto& arena : arenas_) total += arena->capacity();
        return total;
    }

    /// One arena a worker. Called once before a parallel region.
    void prepare(int workers) {
        while (static_cast<int>(arenas_.size()) < workers) arenas_.push_back(std::make_unique<detail::Arena>());
    }
    /// Gives every arena what the largest one has: which worker takes which head next time is open.
    void level() {
        std::size_t most = 0;
        for (const auto& arena : arenas_) most = std::max(most, arena->capacity());
        for (const auto& arena : arenas_) arena->reserve(most);
    }
    detail::Arena& arena(int worker) { return *arenas_[static_cast<std::size_t>(worker)]; }

private:
    std::vector<std::unique_ptr<detail::Arena>> arenas_;
};

namespace detail {

/// The workers that one head may use, and their scratch memory, which is given back when this goes.
class Workers {
public:
    Workers(Workspace& workspace, int first, int count) : workspace_(workspace), first_(first), count_(count) {
        const Arena::Mark own = (*this)[0].mark();
        marks_ = (*this)[0].take<Arena::Mark>(count);
        marks_[0] = own;
        for (int w = 1; w < count; ++w) marks_[static_cast<std::size_t>(w)] = (*this)[w].mark();
    }
    ~Workers() {
        for (int w = count_; w-- > 0;) (*this)[w].release(marks_[static_cast<std::size_t>(w)]);
    }
    Workers(const Workers&) = delete;
    Workers& operator=(const Workers&) = delete;

    /// The same workers; what is taken meanwhile is given back with the result.
    Workers nested() const { return Workers(workspace_, first_, count_); }

    int count() const { return count_; }
    Arena& operator[](int worker) const { return workspace_.arena(first_ + worker); }

private:
    Workspace& workspace_;
    int first_, count_;
    std::span<Arena::Mark> marks_;
};

}  // namespace detail

POLYATTN_END_NAMESPACE
