/* A filesystem that refuses: loaded before libc (LD_PRELOAD), it answers calls on files below $STUBBORN_UNDER.
   $STUBBORN_REFUSES: names of calls, separated by commas, that fail with $STUBBORN_ERRNO.
   $STUBBORN_WRITE: the number of the write, from 1, that fails with $STUBBORN_ERRNO, and $STUBBORN_COUNT: a file of eight
   bytes that counts the writes of all processes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int under(const char *path) {
    const char *root = getenv("STUBBORN_UNDER");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

static int handle_under(int handle) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return under(path);
}

static int path_under(int folder, const char *path) {
    if (path && path[0] == '/') return under(path);
    if (folder != AT_FDCWD) return handle_under(folder);
    char here[PATH_MAX];
    return getcwd(here, sizeof here) && under(here);
}

static int number(const char *name) {
    const char *text = getenv(name);
    return text ? atoi(text) : 0;
}

static int refused(const char *call) {
    const char *names = getenv("STUBBORN_REFUSES");
    char wanted[32], all[256];
    if (!names) return 0;
    snprintf(all, sizeof all, ",%s,", names);
    snprintf(wanted, sizeof wanted, ",%s,", call);
    if (!strstr(all, wanted)) return 0;
    errno = number("STUBBORN_ERRNO");
    return 1;
}

static int write_fails(int handle) {
    static long *count;
    const char *path = getenv("STUBBORN_COUNT");
    if (!path || !handle_under(handle)) return 0;
    if (!count) {
        int file = open(path, O_RDWR);
        void *memory = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        if (memory == MAP_FAILED) return 0;
        count = memory;
    }
    if (__atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST) != number("STUBBORN_WRITE")) return 0;
    errno = number("STUBBORN_ERRNO");
    return 1;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define OF_PATH(name, call, folder, path, parameters, arguments) \
    int name parameters { REAL(name); if (path_under(folder, path) && refused(call)) return -1; return real arguments; }
#define OF_HANDLE(name, call, parameters, arguments) \
    int name parameters { REAL(name); if (handle_under(handle) && refused(call)) return -1; return real arguments; }
#define WRITE(name, parameters, arguments) \
    ssize_t name parameters { REAL(name); if (write_fails(handle)) return -1; return real arguments; }

/* As in the kernel, a name that is there is told before links are refused. */
int link(const char *from, const char *to) {
    REAL(link);
    if (path_under(AT_FDCWD, to) && access(to, F_OK) && refused("link")) return -1;
    return real(from, to);
}

int linkat(int here, const char *from, int there, const char *to, int flags) {
    REAL(linkat);
    if (path_under(there, to) && faccessat(there, to, F_OK, 0) && refused("link")) return -1;
    return real(here, from, there, to, flags);
}

OF_PATH(symlink, "symlink", AT_FDCWD, to, (const char *from, const char *to), (from, to))
OF_PATH(chmod, "chmod", AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
OF_PATH(fchmodat, "chmod", folder, path, (int folder, const char *path, mode_t mode, int flags), (folder, path, mode, flags))
OF_HANDLE(fchmod, "chmod", (int handle, mode_t mode), (handle, mode))
OF_PATH(utimensat, "utime", folder, path, (int folder, const char *path, const struct timespec times[2], int flags), (folder, path, times, flags))
OF_HANDLE(futimens, "utime", (int handle, const struct timespec times[2]), (handle, times))
OF_PATH(rename, "rename", AT_FDCWD, to, (const char *from, const char *to), (from, to))
OF_PATH(renameat, "rename", there, to, (int here, const char *from, int there, const char *to), (here, from, there, to))
OF_HANDLE(fsync, "fsync", (int handle), (handle))
OF_HANDLE(fdatasync, "fsync", (int handle), (handle))
WRITE(write, (int handle, const void *bytes, size_t size), (handle, bytes, size))
WRITE(writev, (int handle, const struct iovec *parts, int count), (handle, parts, count))
WRITE(pwrite, (int handle, const void *bytes, size_t size, off_t at), (handle, bytes, size, at))
WRITE(pwrite64, (int handle, const void *bytes, size_t size, off64_t at), (handle, bytes, size, at))
WRITE(sendfile, (int handle, int from, off_t *at, size_t size), (handle, from, at, size))
WRITE(sendfile64, (int handle, int from, off64_t *at, size_t size), (handle, from, at, size))
