/* An agent at the guest channel (COM2), by polling: says what it is told to, and shows what it hears. */
#include "guest.h"

#define COM2 0x2f8
#define LINE_STATUS (COM2 + 5)
#define DATA_READY 1
#define LINE_MAX 128

static void say(const char *text) {
    while (*text) out8(COM2, (u8)*text++);
}

static int begins(const char *line, const char *with) {
    while (*with && *line == *with) line++, with++;
    return !*with;
}

void agent_hello(void) { say("\nhello 1 bare\n"); }
void agent_bye(void) { say("bye\n"); }

/* Says what is no line of the protocol: bytes of every kind, and one line that does not end for `bytes`. */
void agent_noise(u64 bytes) {
    for (u32 byte = 0; byte < 256; byte++) out8(COM2, (u8)byte);
    for (u64 i = 0; i < bytes; i++) out8(COM2, 'x');
    say("\n\nready 0\nready 0123456789abcdef\nhello 99\n");
}

/* Answers the last `prepare` that was heard. */
static char asked[17];
void agent_answer(int is_ready) {
    say(is_ready ? "ready " : "failed ");
    say(asked);
    say(is_ready ? "\n" : " the bare guest will not\n");
}

/* Waits for one line that is not empty, and shows it: heard=WORD, with the snapshot's name or the generation. */
void agent_hear(void) {
    char line[LINE_MAX];
    u32 length = 0;
    for (;;) {
        while (!(in8(LINE_STATUS) & DATA_READY)) __asm__ volatile("pause");
        char c = (char)in8(COM2);
        if (c != '\n' && length + 1 < sizeof line) line[length++] = c;
        else if (c == '\n' && length) break;
    }
    line[length] = 0;
    if (begins(line, "prepare ")) {
        for (u32 i = 0; i < 16; i++) asked[i] = line[8 + i];
    }
    for (u32 i = 0; i < length; i++)
        if (line[i] == ' ') {
            line[i] = 0;
            print("heard=");
            print(line);
            print(" what=");
            print(line + i + 1);
            end_line();
            return;
        }
    print("heard=");
    print(line);
    end_line();
}

/* Whether something waits to be heard. */
int agent_is_told(void) { return in8(LINE_STATUS) & DATA_READY; }
