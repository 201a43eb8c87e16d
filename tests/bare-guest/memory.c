/* Patterns in memory that cost an interpreted CPU as little as possible. */
#include "guest.h"

static u64 pattern(u64 page, u64 seed) { return (page ^ seed) * 0x9e3779b97f4a7c15ul; }

/* Every word of a page is the page's pattern: string instructions do whole pages at once. */
void fill(u64 start, u64 bytes, u64 seed) {
    for (u64 page = start; page < start + bytes; page += PAGE) {
        u64 at = page, words = PAGE / 8;
        __asm__ volatile("rep stosq" : "+D"(at), "+c"(words) : "a"(pattern(page, seed)) : "memory");
    }
}

/* The first page that is not as `fill` left it, or 0. */
u64 check_fill(u64 start, u64 bytes, u64 seed) {
    for (u64 page = start; page < start + bytes; page += PAGE) {
        volatile u64 *words = (volatile u64 *)page;
        u64 expected = pattern(page, seed);
        for (u32 i = 0; i < PAGE / 8; i++)
            if (words[i] != expected) return page;
    }
    return 0;
}

/* One word a page: dirties many pages in little time. */
void stamp(u64 start, u64 bytes, u64 seed) {
    for (u64 page = start; page < start + bytes; page += PAGE) *(volatile u64 *)page = pattern(page, seed);
}

/* The first page that is not as `stamp` left it, or 0. */
u64 check_stamps(u64 start, u64 bytes, u64 seed) {
    for (u64 page = start; page < start + bytes; page += PAGE)
        if (*(volatile u64 *)page != pattern(page, seed)) return page;
    return 0;
}

/* Round by round, one word at each end of a page: checks that both are of the round before, and writes this one's. A
   memory that is not all of one moment is noticed as soon as the machine goes on with it. Until it is over, as when
   something is typed; the first page that was wrong, or 0. */
u64 churn(u64 start, u64 bytes, int (*is_over)(void), u64 *rounds) {
    for (u64 round = 1;; round++) {
        *rounds = round;
        for (u64 page = start; page < start + bytes; page += PAGE) {
            volatile u64 *words = (volatile u64 *)page;
            u64 before = round > 1 ? pattern(page, round - 1) : words[0];
            if (words[0] != before || (round > 1 && words[PAGE / 8 - 1] != before)) return page;
            words[0] = pattern(page, round);
            words[PAGE / 8 - 1] = pattern(page, round);
        }
        if (is_over()) return 0;
    }
}

/* Writes to page after page of a range, if it has any, and looks at the clock all the time, until something is typed:
   the longest that it did not come to look, in cycles. */
u64 longest_gap(u64 start, u64 bytes, u64 *writes) {
    u64 longest = 0, page = start, last = rdtsc();
    for (*writes = 0;;) {
        for (u32 i = 0; i < 256; i++) {
            if (bytes) {
                *(volatile u64 *)page = last;
                page = page + PAGE < start + bytes ? page + PAGE : start;
                ++*writes;
            }
            u64 now = rdtsc();
            if (now - last > longest) longest = now - last;
            last = now;
        }
        if (is_typed()) return longest;
    }
}

/* Depends on every word and on their order. */
u64 sum(u64 start, u64 bytes) {
    u64 sum = 0;
    for (volatile u64 *word = (volatile u64 *)start; (u64)word < start + bytes; word++)
        sum = (sum << 7 | sum >> 57) ^ *word;
    return sum;
}

/* A step that shares no factor with the count comes by every page once. One of the golden section keeps the first pages,
   however many they are, about as far apart as they can be: none is in what was read ahead for another. */
static u64 scattered_step(u64 count) {
    u64 step = count > 3 ? count * 618034 / 1000000 : 1;
    for (;; step--) {
        u64 a = step, b = count;
        while (b) {
            u64 rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1 || step == 0) return step;
    }
}

/* Reads a word of each page, scattered. */
u64 touch(u64 start, u64 bytes, u64 *pages) {
    u64 count = bytes / PAGE, sum = 0, page = 0, step = scattered_step(count);
    for (u64 i = 0; i < count; i++) {
        sum += *(volatile u64 *)(start + page * PAGE);
        page = (page + step) % count;
    }
    *pages = count;
    return sum;
}

/* Reads a word of each page of some pieces of a range, which lie all over it: piece by piece, scattered. */
u64 spread(u64 start, u64 bytes, u64 piece, u64 pieces) {
    u64 count = piece ? bytes / piece : 0, sum = 0, at = 0, step = scattered_step(count);
    if (pieces > count) pieces = count;
    for (u64 i = 0; i < pieces; i++) {
        for (u64 page = 0; page < piece; page += PAGE) sum += *(volatile u64 *)(start + at * piece + page);
        at = (at + step) % count;
    }
    return sum;
}

/* Reads a word of some of the pages, scattered, and notes how many cycles each read took. */
void time_touches(u64 start, u64 bytes, u64 *cycles, u64 touches) {
    u64 count = bytes / PAGE, page = 0, step = scattered_step(count);
    for (u64 i = 0; i < touches; i++) {
        u64 before = rdtsc();
        (void)*(volatile u64 *)(start + page * PAGE);
        cycles[i] = rdtsc() - before;
        page = (page + step) % count;
    }
}

#define HIGH_GIB 4
#define HIGH_GIBS 2
#define ENTRIES 512
#define PRESENT_WRITABLE 3
#define LARGE (1 << 7)

void map_high(void) {
    static u64 directories[HIGH_GIBS][ENTRIES] __attribute__((aligned(4096)));
    u64 root;
    __asm__ volatile("mov %%cr3, %0" : "=r"(root));
    u64 *level4 = (u64 *)(root & ~0xffful);
    u64 *level3 = (u64 *)(level4[0] & ~0xffful);
    for (u64 gib = 0; gib < HIGH_GIBS; gib++) {
        for (u64 i = 0; i < ENTRIES; i++)
            directories[gib][i] = (HIGH_GIB + gib) << 30 | i << 21 | LARGE | PRESENT_WRITABLE;
        level3[HIGH_GIB + gib] = (u64)directories[gib] | PRESENT_WRITABLE;
    }
    __asm__ volatile("mov %0, %%cr3" : : "r"(root) : "memory");
}
