"""File systems that lack something, as network mounts, FUSE and exFAT do: a library that refuses calls of a process."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

# Each call as the C library has it. ODD_MOUNT lists what is refused, separated by spaces.
SOURCE = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int refused(const char *what, int error) {
    const char *list = getenv("ODD_MOUNT");
    if (!list || !strstr(list, what)) return 0;
    errno = error;
    return 1;
}
static int is_folder(const char *path) {
    struct stat found;
    return lstat(path, &found) == 0 && S_ISDIR(found.st_mode);
}
/* `stale`: every second opening of a run's sign of life fails, as on NFS when another machine has just renamed a file
   over it. `unreadable`: one fails for each file of this name with .bad behind it, which is then removed. */
static int holder_refused(const char *path) {
    static int openings;
    char bad[4096];
    size_t length = strlen(path), end = strlen("/.holder.json");
    if (length < end || strcmp(path + length - end, "/.holder.json") || length > 4000) return 0;
    if (openings++ % 2 == 0 && refused("stale", ESTALE)) return 1;
    strcat(strcpy(bad, path), ".bad");
    return unlink(bad) == 0 && refused("unreadable", EIO);
}
#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

/* `remembers`: as NFS does for up to a minute, a name that did not exist still does not, until the folder that would
   have it is listed. */
static char absent[1000][512];
static int absents;
static int remembered(const char *path) {
    for (int i = 0; i < absents; i++) if (!strcmp(absent[i], path)) return refused("remembers", ENOENT);
    return 0;
}
static int noted(int answer, const char *path) {
    if (answer < 0 && errno == ENOENT && refused("remembers", ENOENT) && absents < 1000 && strlen(path) < 512)
        strcpy(absent[absents++], path);
    return answer;
}
DIR *opendir(const char *path) {
    REAL(opendir);
    if (remembered(path)) return 0;
    DIR *found = real(path);
    if (!found) { noted(-1, path); return 0; }
    size_t length = strlen(path);
    for (int i = 0; i < absents; i++)
        if (!strncmp(absent[i], path, length) && absent[i][length] == '/' && !strchr(absent[i] + length + 1, '/'))
            absent[i][0] = 0;
    return found;
}
int stat64(const char *p, struct stat64 *to) {
    REAL(stat64); return remembered(p) ? -1 : noted(real(p, to), p);
}
int lstat64(const char *p, struct stat64 *to) {
    REAL(lstat64); return remembered(p) ? -1 : noted(real(p, to), p);
}

int chmod(const char *p, mode_t m) { REAL(chmod); return refused("chmod", EPERM) ? -1 : real(p, m); }
int fchmod(int f, mode_t m) { REAL(fchmod); return refused("chmod", EPERM) ? -1 : real(f, m); }
int fchmodat(int d, const char *p, mode_t m, int g) {
    REAL(fchmodat); return refused("chmod", EPERM) ? -1 : real(d, p, m, g);
}
int link(const char *a, const char *b) { REAL(link); return refused("link", EPERM) ? -1 : real(a, b); }
int linkat(int x, const char *a, int y, const char *b, int g) {
    REAL(linkat); return refused("link", EPERM) ? -1 : real(x, a, y, b, g);
}
int symlink(const char *a, const char *b) { REAL(symlink); return refused("link", EPERM) ? -1 : real(a, b); }
int flock(int f, int o) {
    static int (*real)(int, int);
    if (!real) real = dlsym(RTLD_NEXT, "flock");
    return refused("locks", ENOLCK) ? -1 : real(f, o);
}
int fsync(int f) {
    REAL(fsync);
    struct stat found;
    int folder = fstat(f, &found) == 0 && S_ISDIR(found.st_mode);
    if (folder && refused("folder_fsync=EINVAL", EINVAL)) return -1;
    if (folder && refused("folder_fsync=ENOTSUP", ENOTSUP)) return -1;
    if (!folder && refused("file_fsync", EINVAL)) return -1;
    return real(f);
}
int rename(const char *a, const char *b) {
    REAL(rename);
    if (is_folder(a) ? refused("rename_folder", EPERM) : refused("rename_file", ENOSYS)) return -1;
    return real(a, b);
}
int open64(const char *p, int flags, ...) {
    REAL(open64);
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    if (((flags & O_APPEND) && refused("append", ENOTSUP)) || holder_refused(p)) return -1;
    if (!(flags & O_CREAT) && remembered(p)) return -1;
    return flags & O_CREAT ? real(p, flags, mode) : noted(real(p, flags, mode), p);
}
int open(const char *p, int flags, ...) {
    REAL(open);
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    if (((flags & O_APPEND) && refused("append", ENOTSUP)) || holder_refused(p)) return -1;
    if (!(flags & O_CREAT) && remembered(p)) return -1;
    return flags & O_CREAT ? real(p, flags, mode) : noted(real(p, flags, mode), p);
}
"""


def odd_mount(lacks: str) -> dict[str, str]:
    """Environment of a process for which every file system lacks `lacks`, words of SOURCE separated by spaces."""
    return {"LD_PRELOAD": str(_library()), "ODD_MOUNT": lacks}


@cache
def _library() -> Path:
    if os.uname().sysname != "Linux" or shutil.which("cc") is None:
        pytest.skip("NOTHING SHOWS what odd file systems do: that takes Linux and a C compiler")
    folder = Path(tempfile.mkdtemp(prefix="odd-mount-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "odd.c").write_text(SOURCE)
    build = ["cc", "-shared", "-fPIC", "-O1", "-o", str(folder / "odd.so"), str(folder / "odd.c"), "-ldl"]
    subprocess.run(build, check=True, capture_output=True, timeout=60)
    return folder / "odd.so"
