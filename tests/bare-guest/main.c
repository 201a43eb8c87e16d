/* The way in: what the machine says of itself, then the command line's words, then the serial port's. */
#include "guest.h"

/* Offsets in Linux's zero page (Documentation/arch/x86/zero-page.rst). */
#define E820_ENTRIES 0x1e8
#define RAMDISK_IMAGE 0x218
#define RAMDISK_SIZE 0x21c
#define CMD_LINE_PTR 0x228
#define E820_TABLE 0x2d0
#define E820_RAM 1

#define LINE_MAX 256

static u32 read32(u64 address) { return *(volatile u32 *)address; }
static u64 read64(u64 address) { return read32(address) | (u64)read32(address + 4) << 32; }

static void introduce(u64 zero_page) {
    u64 ram = 0, low_end = 0;
    u32 entries = *(volatile u8 *)(zero_page + E820_ENTRIES);
    for (u32 i = 0; i < entries; i++) {
        u64 entry = zero_page + E820_TABLE + i * 20;
        if (read32(entry + 16) != E820_RAM) continue;
        u64 end = read64(entry) + read64(entry + 8);
        ram += read64(entry + 8);
        if (end <= 1ul << 32) low_end = end;
    }
    print("guest=bare");
    field("ram", ram);
    field_hex("low_end", low_end);
    field_hex("initrd", read32(zero_page + RAMDISK_IMAGE));
    field("initrd_bytes", read32(zero_page + RAMDISK_SIZE));
    end_line();
}

static void obey_words(const char *text) {
    char word[LINE_MAX];
    for (;;) {
        while (*text == ' ') text++;
        if (!*text) return;
        u32 length = 0;
        for (; *text && *text != ' '; text++)
            if (length + 1 < LINE_MAX) word[length++] = *text;
        word[length] = 0;
        obey(word);
    }
}

void run(u64 zero_page) {
    introduce(zero_page);
    obey_words((const char *)(u64)read32(zero_page + CMD_LINE_PTR));
    print("listening=1\n");
    for (;;) {
        char line[LINE_MAX];
        read_line(line, sizeof line);
        obey_words(line);
    }
}
