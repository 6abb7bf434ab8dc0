/* What a process reads as the time of day, moved by a number of seconds that lies in a file. Preloaded by tests/chaos.
   Only reads are moved: waits go by the monotonic clock, as they do on a machine whose clock is set. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile const int64_t *moved_by; /* seconds; NULL: not at all */

__attribute__((constructor)) static void find(void) {
    const char *path = getenv("TRUNKLINE_TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *at = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (at != MAP_FAILED) moved_by = at;
}

static time_t moved(void) { return moved_by ? (time_t)*moved_by : 0; }

int clock_gettime(clockid_t id, struct timespec *at) {
    int result = (int)syscall(SYS_clock_gettime, id, at);
    if (!result && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += moved();
    return result;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    (void)zone;
    struct timespec now;
    if (syscall(SYS_clock_gettime, CLOCK_REALTIME, &now)) return -1;
    at->tv_sec = now.tv_sec + moved();
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &now);
    now.tv_sec += moved();
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
