/* The bare guest: a kernel of our own that needs neither IRET nor SSE, so that an interpreted KVM runs it too.
 *
 * It does what the words of its command line say, one after the other, and then what lines on the serial port say.
 * A word is NAME or NAME:ARGUMENT:...; arguments are numbers, decimal or 0x..., with k, m or g after them for KiB,
 * MiB or GiB. Each command answers with one line of KEY=VALUE pairs. See commands.c. */
#ifndef GUEST_H
#define GUEST_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define PAGE 4096ul
/* Memory from here to the end of RAM below the hole is the tests'. */
#define ARENA 0x400000ul
#define ARGUMENTS_MAX 6

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) {
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline u64 rdtsc(void) {
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}
static inline void wrmsr(u32 msr, u64 value) {
    __asm__ volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}
static inline u64 rdmsr(u32 msr) {
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return (u64)high << 32 | low;
}

/* serial.c */
void print(const char *text);
void print_number(u64 number);
void print_hex(u64 number);
/* " KEY=NUMBER" */
void field(const char *key, u64 number);
void field_hex(const char *key, u64 number);
void end_line(void);
/* Reads a line, without its end, cut to `size` with the terminating zero. */
void read_line(char *line, u32 size);
int is_typed(void);

/* memory.c */
void fill(u64 start, u64 bytes, u64 seed);
/* Maps 4 to 6 GiB one to one, as the first 4 are at the start. */
void map_high(void);
u64 check_fill(u64 start, u64 bytes, u64 seed);
void stamp(u64 start, u64 bytes, u64 seed);
u64 check_stamps(u64 start, u64 bytes, u64 seed);
u64 churn(u64 start, u64 bytes, int (*is_over)(void), u64 *rounds);
u64 longest_gap(u64 start, u64 bytes, u64 *writes);
u64 sum(u64 start, u64 bytes);
u64 touch(u64 start, u64 bytes, u64 *pages);
u64 spread(u64 start, u64 bytes, u64 piece, u64 pieces);
void time_touches(u64 start, u64 bytes, u64 *cycles, u64 touches);

/* smp.c */
#define VCPUS_MAX 32
void start_vcpus(u64 count);
u64 churn_together(u64 start, u64 bytes, u64 *rounds);
u64 check_together(u64 start, u64 bytes, u64 stride, u64 seed);

/* block.c */
u64 block_fill(u64 sector, u64 bytes, u64 seed);
u64 block_check(u64 sector, u64 bytes, u64 seed);
u64 block_churn(u64 sector, u64 bytes, u64 *rounds);
u64 block_ask(u64 sector, u64 address);
u64 block_check_zero(u64 sector, u64 bytes);
u64 block_discard(u64 sector, u64 bytes);

/* agent.c */
void agent_hello(void);
void agent_bye(void);
void agent_noise(u64 bytes);
void agent_answer(int is_ready);
void agent_hear(void);
int agent_is_told(void);

/* commands.c */
void obey(const char *word);

#endif
