/* The first block device, by polling (virtio 1.2 §4.2, §5.2). All of the driver's state is in RAM: after a resume it
 * goes on with the indices that it had. */
#include "guest.h"

#define SLOTS 0xc0001000ul
#define SLOTS_MAX 16

#define MAGIC 0x000
#define MAGIC_VALUE 0x74726976
#define DEVICE_ID 0x008
#define DEVICE_FEATURES 0x010
#define DEVICE_FEATURES_SELECT 0x014
#define DRIVER_FEATURES 0x020
#define DRIVER_FEATURES_SELECT 0x024
#define QUEUE_SELECT 0x030
#define QUEUE_SIZE 0x038
#define QUEUE_READY 0x044
#define QUEUE_NOTIFY 0x050
#define STATUS 0x070
#define QUEUE_DESCRIPTORS 0x080
#define QUEUE_DRIVER 0x090
#define QUEUE_DEVICE 0x0a0

#define BLOCK 2
#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define FEATURES_OK 8
#define F_DISCARD (1u << 13)
#define F_VERSION_1 (1u << 0) /* of the second word */

#define T_IN 0
#define T_OUT 1
#define T_DISCARD 11

#define NEXT 1
#define DEVICE_WRITES 2

#define SIZE 4
#define SECTOR 512

struct descriptor { u64 address; u32 length; u16 flags, next; };
struct used { u32 id, length; };

static struct descriptor descriptors[SIZE] __attribute__((aligned(16)));
static volatile struct { u16 flags, index, ring[SIZE]; } available __attribute__((aligned(4)));
static volatile struct { u16 flags, index; struct used ring[SIZE]; } used __attribute__((aligned(4)));
static struct { u32 type, reserved; u64 sector; } header;
static struct { u64 sector; u32 sectors, flags; } range;
static volatile u8 status;
static u8 buffer[PAGE] __attribute__((aligned(4096)));
static u64 device;

static u32 get(u32 at) { return *(volatile u32 *)(device + at); }
static void set(u32 at, u32 value) { *(volatile u32 *)(device + at) = value; }
static void set_address(u32 at, volatile void *address) {
    set(at, (u32)(u64)address);
    set(at + 4, (u32)((u64)address >> 32));
}

static int is_ready(void) {
    if (device) return 1;
    for (u64 slot = 0; slot < SLOTS_MAX; slot++) {
        device = SLOTS + slot * PAGE;
        if (get(MAGIC) == MAGIC_VALUE && get(DEVICE_ID) == BLOCK) break;
        device = 0;
    }
    if (!device) return 0;
    set(STATUS, 0);
    set(STATUS, ACKNOWLEDGE | DRIVER);
    set(DEVICE_FEATURES_SELECT, 0);
    set(DRIVER_FEATURES_SELECT, 0);
    set(DRIVER_FEATURES, get(DEVICE_FEATURES) & F_DISCARD);
    set(DRIVER_FEATURES_SELECT, 1);
    set(DRIVER_FEATURES, F_VERSION_1);
    set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    set(QUEUE_SELECT, 0);
    set(QUEUE_SIZE, SIZE);
    set_address(QUEUE_DESCRIPTORS, descriptors);
    set_address(QUEUE_DRIVER, &available);
    set_address(QUEUE_DEVICE, &used);
    set(QUEUE_READY, 1);
    set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return 1;
}

/* Makes a request and does not wait for it; the index of the used ring when it is done. */
static u16 ask(u32 type, u64 sector, void *data, u32 length) {
    header.type = type;
    header.sector = sector;
    status = 0xff;
    descriptors[0] = (struct descriptor){(u64)&header, sizeof header, NEXT, 1};
    descriptors[1] = (struct descriptor){(u64)data, length, type == T_IN ? NEXT | DEVICE_WRITES : NEXT, 2};
    descriptors[2] = (struct descriptor){(u64)&status, 1, DEVICE_WRITES, 0};
    available.ring[available.index % SIZE] = 0;
    __asm__ volatile("" ::: "memory");
    u16 expected = (u16)(used.index + 1);
    available.index = (u16)(available.index + 1);
    __asm__ volatile("lock; addl $0, (%%rsp)" ::: "memory", "cc");
    set(QUEUE_NOTIFY, 0);
    return expected;
}

/* One request, from start to end; its status. */
static u8 request(u32 type, u64 sector, void *data, u32 length) {
    u16 expected = ask(type, sector, data, length);
    while (used.index != expected) __asm__ volatile("pause" ::: "memory");
    return status;
}

/* All of these: the first sector that was not as it should be, one too many, or 0. */
u64 block_fill(u64 sector, u64 bytes, u64 seed) {
    if (!is_ready()) return sector + 1;
    for (u64 end = sector + bytes / SECTOR; sector < end; sector += PAGE / SECTOR) {
        fill((u64)buffer, PAGE, seed + sector);
        if (request(T_OUT, sector, buffer, PAGE)) return sector + 1;
    }
    return 0;
}

u64 block_check(u64 sector, u64 bytes, u64 seed) {
    if (!is_ready()) return sector + 1;
    for (u64 end = sector + bytes / SECTOR; sector < end; sector += PAGE / SECTOR)
        if (request(T_IN, sector, buffer, PAGE) || check_fill((u64)buffer, PAGE, seed + sector)) return sector + 1;
    return 0;
}

/* As `churn` does with memory. */
u64 block_churn(u64 sector, u64 bytes, u64 *rounds) {
    if (!is_ready()) return sector + 1;
    for (u64 round = 1;; round++) {
        *rounds = round;
        for (u64 at = sector; at < sector + bytes / SECTOR; at += PAGE / SECTOR) {
            if (request(T_IN, at, buffer, PAGE)) return at + 1;
            if (round > 1 && check_fill((u64)buffer, PAGE, round - 1 + at)) return at + 1;
            fill((u64)buffer, PAGE, round + at);
            if (request(T_OUT, at, buffer, PAGE)) return at + 1;
        }
        if (is_typed()) return 0;
    }
}

/* Asks for a page of the drive, to be put at `address`, and goes on. */
u64 block_ask(u64 sector, u64 address) {
    if (!is_ready()) return sector + 1;
    ask(T_IN, sector, (void *)address, PAGE);
    return 0;
}

u64 block_check_zero(u64 sector, u64 bytes) {
    if (!is_ready()) return sector + 1;
    for (u64 end = sector + bytes / SECTOR; sector < end; sector += PAGE / SECTOR) {
        if (request(T_IN, sector, buffer, PAGE)) return sector + 1;
        for (u32 i = 0; i < PAGE / 8; i++)
            if (((volatile u64 *)buffer)[i]) return sector + 1;
    }
    return 0;
}

u64 block_discard(u64 sector, u64 bytes) {
    if (!is_ready()) return sector + 1;
    range.sector = sector;
    range.sectors = (u32)(bytes / SECTOR);
    return request(T_DISCARD, 0, &range, sizeof range) ? sector + 1 : 0;
}
