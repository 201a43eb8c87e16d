/* The other processors: started as a PC's are (Intel SDM volume 3, §9.4.4), each works through its own slice of what
 * all are told to do together. */
#include "guest.h"

/* xAPIC registers, where they are after a reset. */
#define APIC_ID 0xfee00020ul
#define APIC_COMMAND 0xfee00300ul
#define APIC_COMMAND_HIGH 0xfee00310ul
#define INIT 0x4500
#define STARTUP 0x4600
#define APIC_ID_SHIFT 24

/* A page below 1 MiB that nothing else is in. */
#define TRAMPOLINE 0x30000ul
#define STACK 4096

/* start.S: what is copied there, and what it reads. */
extern u8 ap_start[], ap_end[], ap_root[], ap_stack[];

struct task {
    u64 start, bytes, seed, kind;
    u64 wrong, rounds;
    volatile u64 state;
};
enum { ASLEEP, IDLE, GIVEN };
enum { CHURN, CHECK };

static struct task tasks[VCPUS_MAX];
static u8 stacks[VCPUS_MAX][STACK] __attribute__((aligned(16)));
static volatile u64 is_over;
static volatile u64 last_awake;
static u64 vcpus = 1;

static int is_told(void) { return is_over != 0; }
static void set(u64 address, u32 value) { *(volatile u32 *)address = value; }
static void relax(void) { __asm__ volatile("pause" ::: "memory"); }

static void work(struct task *task) {
    task->rounds = 0;
    task->wrong = task->kind == CHURN ? churn(task->start, task->bytes, is_told, &task->rounds)
                                      : check_fill(task->start, task->bytes, task->seed);
}

/* Where start.S comes to. */
void ap_run(void) {
    struct task *task = &tasks[last_awake];
    task->state = IDLE;
    for (;;) {
        while (task->state != GIVEN) relax();
        work(task);
        __asm__ volatile("" ::: "memory");
        task->state = IDLE;
    }
}

/* Wakes so many in all, one after the other. */
void start_vcpus(u64 count) {
    u64 root;
    __asm__ volatile("mov %%cr3, %0" : "=r"(root));
    for (u64 i = 0; i < (u64)(ap_end - ap_start); i++) ((volatile u8 *)TRAMPOLINE)[i] = ap_start[i];
    for (; vcpus < count && vcpus < VCPUS_MAX; vcpus++) {
        *(volatile u32 *)(TRAMPOLINE + (u64)(ap_root - ap_start)) = (u32)root;
        *(volatile u64 *)(TRAMPOLINE + (u64)(ap_stack - ap_start)) = (u64)(stacks[vcpus] + STACK);
        last_awake = vcpus;
        set(APIC_COMMAND_HIGH, (u32)(vcpus << APIC_ID_SHIFT));
        set(APIC_COMMAND, INIT);
        set(APIC_COMMAND_HIGH, (u32)(vcpus << APIC_ID_SHIFT));
        set(APIC_COMMAND, STARTUP | (u32)(TRAMPOLINE >> 12));
        while (tasks[vcpus].state == ASLEEP) relax();
    }
}

/* The first page that was wrong for any of them, or 0; `rounds` are those of the one that went fewest. */
static u64 together(u64 kind, u64 start, u64 bytes, u64 stride, u64 seed, u64 *rounds) {
    is_over = 0;
    for (u64 i = 0; i < vcpus; i++)
        tasks[i] = (struct task){start + i * stride, bytes, seed, kind, 0, 0, i ? IDLE : GIVEN};
    __asm__ volatile("" ::: "memory");
    for (u64 i = 1; i < vcpus; i++) tasks[i].state = GIVEN;
    if (kind == CHURN) tasks[0].wrong = churn(start, bytes, is_typed, &tasks[0].rounds);
    else work(&tasks[0]);
    is_over = 1;
    u64 wrong = 0;
    *rounds = tasks[0].rounds;
    for (u64 i = 0; i < vcpus; i++) {
        if (i) while (tasks[i].state != IDLE) relax();
        if (tasks[i].wrong) wrong = tasks[i].wrong;
        if (tasks[i].rounds < *rounds) *rounds = tasks[i].rounds;
    }
    return wrong;
}

u64 churn_together(u64 start, u64 bytes, u64 *rounds) { return together(CHURN, start, bytes, bytes, 0, rounds); }

u64 check_together(u64 start, u64 bytes, u64 stride, u64 seed) {
    u64 rounds;
    return together(CHECK, start, bytes, stride, seed, &rounds);
}
