/* What the guest can be told to do. */
#include "guest.h"

#define SLEEP_CONTROL 0x600
#define RESET 0x602
#define SLEEP_S5 (5 << 2 | 1 << 5)
#define RESET_VALUE 1
#define I8042 0x64
#define I8042_RESET 0xfe
#define TOUCHES_MAX 1024
#define VMGENID 0xfe000

/* Goes on from where it was after a resume: nothing but RAM holds it. */
static u64 counter;

static void bad(const char *word) {
    print("error=unknown word=");
    print(word);
    end_line();
}

static int is(const char *word, const char *name) {
    while (*name && *word == *name) word++, name++;
    return !*name && (!*word || *word == ':');
}

static u64 number(const char **text) {
    u64 value = 0, base = 10;
    if ((*text)[0] == '0' && (*text)[1] == 'x') base = 16, *text += 2;
    for (;; ++*text) {
        char c = **text;
        if (c >= '0' && c <= '9') value = value * base + (u64)(c - '0');
        else if (base == 16 && c >= 'a' && c <= 'f') value = value * 16 + (u64)(c - 'a' + 10);
        else break;
    }
    switch (**text) {
    case 'k': ++*text; return value << 10;
    case 'm': ++*text; return value << 20;
    case 'g': ++*text; return value << 30;
    default: return value;
    }
}

static void arguments(const char *word, u64 *found) {
    for (u32 i = 0; i < ARGUMENTS_MAX; i++) found[i] = 0;
    while (*word && *word != ':') word++;
    for (u32 i = 0; i < ARGUMENTS_MAX && *word == ':'; i++) {
        word++;
        found[i] = number(&word);
    }
}

static void halt(void) {
    for (;;) __asm__ volatile("cli; hlt");
}

/* count:TIMES, for ever if TIMES is 0: a line for each. */
static void count(u64 times) {
    for (u64 i = 0; !times || i < times; i++) {
        print("count=");
        print_number(++counter);
        end_line();
    }
}

/* Waits until the machine has another generation identifier: until it is a clone of what it was. */
static void generation(void) {
    volatile u64 *id = (volatile u64 *)VMGENID;
    u64 first = id[0], second = id[1];
    print("generation=known");
    end_line();
    while (id[0] == first && id[1] == second) __asm__ volatile("pause");
    print("generation=new");
    end_line();
}

/* latency:START:BYTES:TOUCHES: scattered reads, a line with the cycles of each. */
static void latency(u64 start, u64 bytes, u64 touches) {
    static u64 cycles[TOUCHES_MAX];
    if (touches > TOUCHES_MAX) touches = TOUCHES_MAX;
    time_touches(start, bytes, cycles, touches);
    for (u64 i = 0; i < touches; i++) {
        print("cycles=");
        print_number(cycles[i]);
        end_line();
    }
    print("latency=done");
    end_line();
}

static void verdict(const char *what, u64 wrong_page, u64 *rounds) {
    print(what);
    print(wrong_page ? "=wrong" : "=right");
    if (wrong_page) {
        field_hex("page", wrong_page);
        field_hex("holds", *(volatile u64 *)wrong_page);
    }
    if (rounds) field("rounds", *rounds);
    end_line();
}

/* `failed` is one more than the sector at which it did, or 0. */
static void block(const char *what, u64 failed, u64 *rounds) {
    print(what);
    if (failed) {
        print("=wrong");
        field("sector", failed - 1);
    } else {
        print("=right");
    }
    if (rounds) field("rounds", *rounds);
    end_line();
}

static void done(const char *what) {
    print(what);
    print("=done");
}

/* What goes on until something is typed has begun. */
static void begun(const char *what) {
    print("begun=");
    print(what);
    end_line();
}

static void triple_fault(void) {
    struct { u16 limit; u64 base; } __attribute__((packed)) none = {0, 0};
    __asm__ volatile("lidt %0" : : "m"(none));
    /* Far above what is mapped: a page fault, then that it cannot be delivered, then that this cannot either. */
    *(volatile u64 *)(1ul << 40);
}

void obey(const char *word) {
    u64 a[ARGUMENTS_MAX];
    arguments(word, a);
    if (is(word, "count")) {
        count(a[0]);
    } else if (is(word, "beat")) { /* counts until something is typed: shows when a machine stands and when it runs */
        while (!is_typed()) count(1);
    } else if (is(word, "generation")) { /* until it is a clone of what it was */
        generation();
    } else if (is(word, "latency")) {
        latency(a[0], a[1], a[2]);
    } else if (is(word, "fill")) { /* fill:START:BYTES:SEED */
        fill(a[0], a[1], a[2]);
        done("fill"), end_line();
    } else if (is(word, "checkfill")) {
        verdict("checkfill", check_fill(a[0], a[1], a[2]), 0);
    } else if (is(word, "stamp")) { /* stamp:START:BYTES:SEED */
        stamp(a[0], a[1], a[2]);
        done("stamp"), end_line();
    } else if (is(word, "checkstamp")) {
        verdict("checkstamp", check_stamps(a[0], a[1], a[2]), 0);
    } else if (is(word, "churn")) { /* churn:START:BYTES, until something is typed */
        begun("churn");
        u64 rounds, wrong = churn(a[0], a[1], is_typed, &rounds);
        verdict("churn", wrong, &rounds);
    } else if (is(word, "vcpus")) { /* vcpus:COUNT: wakes the others, so that there are so many */
        start_vcpus(a[0]);
        done("vcpus"), end_line();
    } else if (is(word, "churntogether")) { /* churntogether:START:BYTES, so many for each, until something is typed */
        begun("churntogether");
        u64 rounds, wrong = churn_together(a[0], a[1], &rounds);
        verdict("churntogether", wrong, &rounds);
    } else if (is(word, "checktogether")) { /* checktogether:START:BYTES:STRIDE:SEED, so many for each, so far apart */
        verdict("checktogether", check_together(a[0], a[1], a[2], a[3]), 0);
    } else if (is(word, "diskchurn")) { /* diskchurn:SECTOR:BYTES, until something is typed */
        begun("diskchurn");
        u64 rounds, failed = block_churn(a[0], a[1], &rounds);
        block("diskchurn", failed, &rounds);
    } else if (is(word, "gap")) { /* gap:START:BYTES, of 0 bytes to write to none, until something is typed */
        u64 writes, longest = longest_gap(a[0], a[1], &writes);
        print("gap=");
        print_number(longest);
        field("writes", writes), end_line();
    } else if (is(word, "sum")) { /* sum:START:BYTES */
        print("sum=");
        print_hex(sum(a[0], a[1]));
        end_line();
    } else if (is(word, "touch")) { /* touch:START:BYTES */
        u64 pages, total = touch(a[0], a[1], &pages);
        done("touch"), field("pages", pages), field_hex("total", total), end_line();
    } else if (is(word, "spread")) { /* spread:START:BYTES:PIECE:PIECES */
        u64 total = spread(a[0], a[1], a[2], a[3]);
        done("spread"), field_hex("total", total), end_line();
    } else if (is(word, "poke")) { /* poke:ADDRESS:VALUE */
        *(volatile u64 *)a[0] = a[1];
        done("poke"), end_line();
    } else if (is(word, "pokebyte")) { /* pokebyte:ADDRESS:VALUE */
        *(volatile u8 *)a[0] = (u8)a[1];
        done("pokebyte"), end_line();
    } else if (is(word, "maphigh")) { /* makes 4 to 6 GiB reachable */
        map_high();
        done("maphigh"), end_line();
    } else if (is(word, "peek")) { /* peek:ADDRESS */
        print("peek=");
        print_hex(*(volatile u64 *)a[0]);
        end_line();
    } else if (is(word, "diskfill")) { /* diskfill:SECTOR:BYTES:SEED */
        block("diskfill", block_fill(a[0], a[1], a[2]), 0);
    } else if (is(word, "checkdisk")) { /* checkdisk:SECTOR:BYTES:SEED */
        block("checkdisk", block_check(a[0], a[1], a[2]), 0);
    } else if (is(word, "diskask")) { /* diskask:SECTOR:ADDRESS, without waiting: the device writes there at some time */
        block("diskask", block_ask(a[0], a[1]), 0);
    } else if (is(word, "checkdiskzero")) { /* checkdiskzero:SECTOR:BYTES */
        block("checkdiskzero", block_check_zero(a[0], a[1]), 0);
    } else if (is(word, "diskdiscard")) { /* diskdiscard:SECTOR:BYTES */
        block("diskdiscard", block_discard(a[0], a[1]), 0);
    } else if (is(word, "rdmsr")) { /* rdmsr:NUMBER */
        print("rdmsr=");
        print_hex(rdmsr((u32)a[0]));
        end_line();
    } else if (is(word, "wrmsr")) { /* wrmsr:NUMBER:VALUE */
        wrmsr((u32)a[0], a[1]);
        done("wrmsr"), end_line();
    } else if (is(word, "agenthello")) { /* the guest channel: an agent is there */
        agent_hello();
        done("agenthello"), end_line();
    } else if (is(word, "agentbye")) {
        agent_bye();
        done("agentbye"), end_line();
    } else if (is(word, "agentnoise")) { /* agentnoise:BYTES */
        agent_noise(a[0]);
        done("agentnoise"), end_line();
    } else if (is(word, "agenthear")) { /* waits for a line */
        agent_hear();
    } else if (is(word, "agentready")) { /* to the last `prepare` that was heard */
        agent_answer(1);
        done("agentready"), end_line();
    } else if (is(word, "agentfailed")) {
        agent_answer(0);
        done("agentfailed"), end_line();
    } else if (is(word, "agenttold")) { /* whether there is something to hear */
        print(agent_is_told() ? "agenttold=something" : "agenttold=nothing");
        end_line();
    } else if (is(word, "tsc")) {
        print("tsc=");
        print_number(rdtsc());
        end_line();
    } else if (is(word, "poweroff")) {
        out8(SLEEP_CONTROL, SLEEP_S5);
        halt();
    } else if (is(word, "reset")) {
        out8(RESET, RESET_VALUE);
        halt();
    } else if (is(word, "i8042reset")) {
        out8(I8042, I8042_RESET);
        halt();
    } else if (is(word, "triplefault")) {
        triple_fault();
    } else if (is(word, "halt")) {
        halt();
    } else if (is(word, "spin")) {
        for (;;) __asm__ volatile("pause");
    } else {
        bad(word);
    }
}
