/*
 * A guest at work: what a save and a restore must not disturb, kept busy for as long as the guest lives.
 *
 *   work JOB...             runs all jobs, and prints lines of counters on and on:
 *                             work=LINE registers=ROUNDS disk=ROUNDS stream=ROUNDS memory=ROUNDS
 *     registers             values in every vector register, one process a CPU; ends at SIGUSR1
 *     disk:DEVICE           four processes that write, flush, read and compare past the cache
 *     stream:ADDRESS:PORT   a TCP connection to somebody who sends back what he gets
 *     memory:MIB            so much memory, of which each word is compared and written anew in each round
 *   work sleep:SECONDS      prints sleeping=SECONDS, sleeps so long, and prints slept=MILLISECONDS, by the clock that
 *                           never jumps; from the first line on, a pause of the guest does not put off the end
 *
 * A line counts one up, so that lost and doubled ones are seen. They come in bursts that take the serial port longer
 * than the program; between two the port rests for three times as long as it was busy, for its driver sends with
 * interrupts disabled, and where a port is slow a CPU that did nothing else would be called hung by its kernel.
 * What goes wrong is said as error=..., and that job ends.
 *
 * Static: the guest has no libraries.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* A guest that were busy all the time would tell nothing about its timers. */
enum { LINES_PER_BURST = 8, BURST_PAUSE_US = 60000, BUSY_MAX_US = 1000000, JOB_PAUSE_US = 20000 };
enum { WRITERS = 4, BLOCK = 64 << 10, BLOCKS = 4 };
enum { MESSAGE = 1024, MESSAGES = 16 };

/* Shared by all processes. */
struct counters { volatile uint64_t registers, disk, stream, memory; };
static struct counters *counters;

static void say(const char *text) { (void)!write(1, text, strlen(text)); }

static _Noreturn void fail(const char *what)
{
	char line[128];
	snprintf(line, sizeof line, "error=%s: %m\n", what);
	say(line);
	exit(1);
}

static int64_t now_us(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ll + now.tv_nsec / 1000;
}

static void nap(int64_t us)
{
	struct timespec left = { us / 1000000, us % 1000000 * 1000 };
	while (nanosleep(&left, &left)) { }
}

#define ALL(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11) op(12) op(13) op(14) op(15)
#define SPIN "1: dec %0; jnz 1b;"
#define LOAD_YMM(n) "vmovdqu 32*" #n "(%1), %%ymm" #n ";"
#define STORE_YMM(n) "vmovdqu %%ymm" #n ", 32*" #n "(%2);"
#define LOAD_XMM(n) "movdqu 32*" #n "(%1), %%xmm" #n ";"
#define STORE_XMM(n) "movdqu %%xmm" #n ", 32*" #n "(%2);"
#define VECTORS "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
	"xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

/* Nothing but the registers has the values while the loop runs, however often it is interrupted. */
static void hold_xmm(const uint8_t *in, uint8_t *out, long spins)
{
	__asm__ volatile(ALL(LOAD_XMM) SPIN ALL(STORE_XMM) : "+r"(spins) : "r"(in), "r"(out) : VECTORS);
}

__attribute__((target("avx"))) static void hold_ymm(const uint8_t *in, uint8_t *out, long spins)
{
	__asm__ volatile(ALL(LOAD_YMM) SPIN ALL(STORE_YMM) "vzeroupper;" : "+r"(spins) : "r"(in), "r"(out) : VECTORS);
}

static void keep_registers(int cpu)
{
	cpu_set_t one;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	if (sched_setaffinity(0, sizeof one, &one))
		fail("cannot choose a CPU");
	nice(10);
	signal(SIGUSR1, SIG_DFL);
	const int width = __builtin_cpu_supports("avx") ? 32 : 16;
	const unsigned strange_rounding = 0x7f80; /* MXCSR: towards zero */
	__builtin_ia32_ldmxcsr(strange_rounding);
	for (uint64_t round = 1;; round++) {
		uint8_t in[16][32], out[16][32];
		for (int i = 0; i < 16 * 32; i++)
			((uint8_t *)in)[i] = (uint8_t)(i * 7 + cpu * 31 + round);
		memset(out, 0, sizeof out);
		(width == 32 ? hold_ymm : hold_xmm)(in[0], out[0], 3000000);
		for (int i = 0; i < 16; i++)
			if (memcmp(in[i], out[i], width))
				fail("a vector register has changed");
		if ((__builtin_ia32_stmxcsr() & ~0x3fu) != strange_rounding)
			fail("MXCSR has changed");
		__sync_fetch_and_add(&counters->registers, 1);
	}
}

static void fill(uint64_t *block, uint64_t writer, uint64_t number, uint64_t round)
{
	for (int i = 0; i < BLOCK / 8; i++)
		block[i] = writer << 56 | number << 48 | (uint64_t)i << 32 | round;
}

static void read_and_compare(int disk, off_t at, uint64_t *found, const uint64_t *expected)
{
	if (pread(disk, found, BLOCK, at) != BLOCK)
		fail("cannot read the disk");
	if (memcmp(found, expected, BLOCK))
		fail("the disk has something else than was written");
}

static void write_and_read(const char *path, int writer)
{
	int disk = open(path, O_RDWR | O_DIRECT);
	uint64_t *now, *found;
	if (disk < 0 || posix_memalign((void **)&now, 4096, BLOCK) || posix_memalign((void **)&found, 4096, BLOCK))
		fail("cannot use the disk");
	for (uint64_t round = 1;; round++) {
		off_t start = (off_t)writer * BLOCKS * BLOCK;
		for (int b = 0; b < BLOCKS; b++) {
			off_t at = start + b * BLOCK;
			if (round > 1) {
				fill(now, writer, b, round - 1);
				read_and_compare(disk, at, found, now);
			}
			fill(now, writer, b, round);
			if (pwrite(disk, now, BLOCK, at) != BLOCK)
				fail("cannot write the disk");
		}
		if (fsync(disk))
			fail("cannot flush the disk");
		for (int b = 0; b < BLOCKS; b++) {
			fill(now, writer, b, round);
			read_and_compare(disk, start + b * BLOCK, found, now);
		}
		__sync_fetch_and_add(&counters->disk, 1);
		nap(JOB_PAUSE_US);
	}
}

static void transfer(int to, uint8_t *bytes, size_t count, int outwards)
{
	for (size_t done = 0; done < count;) {
		ssize_t more = outwards ? write(to, bytes + done, count - done) : read(to, bytes + done, count - done);
		if (more <= 0)
			fail(outwards ? "cannot send" : "cannot receive");
		done += more;
	}
}

static void send_and_receive(char *address)
{
	char *port = strchr(address, ':');
	if (!port)
		fail("an address has a port");
	*port++ = 0;
	struct sockaddr_in peer = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };
	int stream = socket(AF_INET, SOCK_STREAM, 0);
	if (!inet_aton(address, &peer.sin_addr) || connect(stream, (struct sockaddr *)&peer, sizeof peer))
		fail("cannot connect");
	for (uint64_t round = 1;; round++) {
		static uint8_t sent[MESSAGES * MESSAGE], received[MESSAGES * MESSAGE];
		for (size_t i = 0; i < sizeof sent; i++)
			sent[i] = (uint8_t)(i / 3 + round);
		transfer(stream, sent, sizeof sent, 1);
		transfer(stream, received, sizeof received, 0);
		if (memcmp(sent, received, sizeof sent))
			fail("something else came back than was sent");
		__sync_fetch_and_add(&counters->stream, 1);
		nap(JOB_PAUSE_US);
	}
}

static void compare_and_write(long mib)
{
	const uint64_t words = (uint64_t)mib << 17;
	uint64_t *memory = mmap(NULL, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mib <= 0 || memory == MAP_FAILED)
		fail("no memory");
	for (uint64_t round = 0;; round++) {
		for (uint64_t word = 0; word < words; word++) {
			if (round && memory[word] != (round << 40 ^ word))
				fail("memory has something else than was written");
			memory[word] = (round + 1) << 40 ^ word;
		}
		__sync_fetch_and_add(&counters->memory, 1);
		nap(JOB_PAUSE_US);
	}
}

static void sleep_for(long seconds)
{
	const int64_t from = now_us();
	struct timespec until;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += seconds;
	printf("sleeping=%ld\n", seconds);
	fflush(stdout);
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL)) { }
	printf("slept=%lld\n", (long long)(now_us() - from) / 1000);
}

/* A child that ends when this process does. */
static int child(void)
{
	if (fork())
		return 0;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	return 1;
}

static void start(char *job)
{
	char *what = strchr(job, ':');
	if (what)
		*what++ = 0;
	if (!strcmp(job, "registers")) {
		for (long cpu = sysconf(_SC_NPROCESSORS_ONLN); cpu-- > 0;)
			if (child())
				keep_registers((int)cpu);
	} else if (!strcmp(job, "disk") && what) {
		for (int writer = 0; writer < WRITERS; writer++)
			if (child())
				write_and_read(what, writer);
	} else if (!strcmp(job, "stream") && what) {
		if (child())
			send_and_receive(what);
	} else if (!strcmp(job, "memory") && what) {
		if (child())
			compare_and_write(atol(what));
	} else
		fail("no such job");
}

int main(int count, char **arguments)
{
	if (count == 2 && !strncmp(arguments[1], "sleep:", 6)) {
		sleep_for(atol(arguments[1] + 6));
		return 0;
	}
	counters = mmap(NULL, sizeof *counters, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (counters == MAP_FAILED)
		fail("no memory");
	signal(SIGUSR1, SIG_IGN);
	for (int i = 1; i < count; i++)
		start(arguments[i]);
	int64_t begun = now_us();
	for (uint64_t line = 1;; line++) {
		char text[128];
		snprintf(text, sizeof text, "work=%lu registers=%lu disk=%lu stream=%lu memory=%lu\n", line,
			 counters->registers, counters->disk, counters->stream, counters->memory);
		say(text);
		if (line % LINES_PER_BURST == 0) {
			tcdrain(1);
			const int64_t busy = now_us() - begun;
			/* Longer only if the clock was set forward meanwhile. */
			nap(BURST_PAUSE_US + 3 * (busy < BUSY_MAX_US ? busy : BUSY_MAX_US));
			begun = now_us();
		}
	}
}
