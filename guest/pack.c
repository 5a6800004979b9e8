/* Trees as tar streams, out of a box: ustar with GNU long names. What a machine has changed goes out as an image
 * layer: with whiteouts, and a pax header before each entry (mtime, ctime, SCHILY.xattr). */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "guest.h"
#include "tar.h"

static bool as_layer;

static void set_number(char *field, size_t width, uint64_t number)
{
    if (number < 1ull << (3 * (width - 1))) {
        snprintf(field, width, "%0*llo", (int)width - 1, (unsigned long long)number);
        return;
    }
    memset(field, 0, width); /* GNU: base 256 */
    field[0] = (char)0x80;
    for (size_t i = width - 1; i > width - 9; i--, number >>= 8)
        field[i] = (char)(number & 0xff);
}

static bool put_header(struct header *h)
{
    unsigned sum = 0;
    memcpy(h->magic, "ustar  ", 8);
    memset(h->checksum, ' ', 8);
    for (size_t i = 0; i < sizeof *h; i++)
        sum += ((unsigned char *)h)[i];
    snprintf(h->checksum, 8, "%06o", sum);
    return put_all(1, h, sizeof *h);
}

static bool pad(uint64_t length)
{
    static const char zeros[BLOCK];
    return length % BLOCK == 0 || put_all(1, zeros, BLOCK - length % BLOCK);
}

/* GNU: the real name comes before, as the content of an entry of its own. */
static bool put_long(char type, const char *text)
{
    struct header h = {.type = type};
    size_t length = strlen(text) + 1;
    strcpy(h.name, "././@LongLink");
    set_number(h.size, sizeof h.size, length);
    return put_header(&h) && put_all(1, text, length) && pad(length);
}

static void put_pax(struct bytes *out, const char *key, const void *value, size_t size)
{
    char text[32];
    size_t rest = strlen(key) + size + 3, length = rest;
    while (length != rest + (size_t)snprintf(text, sizeof text, "%zu", length))
        length = rest + strlen(text); /* it counts its own digits */
    bytes_add(out, text, strlen(text));
    bytes_add(out, " ", 1);
    bytes_add(out, key, strlen(key));
    bytes_add(out, "=", 1);
    bytes_add(out, value, size);
    bytes_add(out, "\n", 1);
}

static void put_pax_time(struct bytes *out, const char *key, const struct timespec *time)
{
    char text[64];
    int length = snprintf(text, sizeof text, "%lld.%09ld", (long long)time->tv_sec, time->tv_nsec);
    put_pax(out, key, text, (size_t)length);
}

/* Attributes of a file that its layer has too; those of overlayfs itself are said otherwise. */
static bool put_xattrs(struct bytes *out, const char *path)
{
    static char names[64 * 1024], value[64 * 1024];
    char key[16 + 256];
    ssize_t length = llistxattr(path, names, sizeof names);
    if (length < 0)
        return errno == ENOTSUP;
    for (const char *name = names; name < names + length; name += strlen(name) + 1) {
        if (!strncmp(name, "trusted.overlay.", 16))
            continue;
        ssize_t size = lgetxattr(path, name, value, sizeof value);
        if (size < 0)
            return false;
        snprintf(key, sizeof key, "SCHILY.xattr.%.255s", name);
        put_pax(out, key, value, (size_t)size);
    }
    return true;
}

static bool put_whiteout(const char *name)
{
    struct header h = {.type = '0'};
    if (strlen(name) > 99 && !put_long('L', name))
        return false;
    strncpy(h.name, name, 99);
    set_number(h.mode, sizeof h.mode, 0);
    set_number(h.size, sizeof h.size, 0);
    return put_header(&h);
}

/* As image layers mark what is not there any more. */
static bool put_mark(const char *path, const char *name)
{
    char *marked;
    bool put = asprintf(&marked, "%.*s.wh.%s", (int)(strrchr(path, '/') + 1 - path), path, name) >= 0;
    put = put && put_whiteout(marked);
    free(marked);
    return put;
}

/* The pax header of an entry of a layer. */
static bool put_extended(const char *file, const struct stat *s)
{
    struct bytes pax = {0};
    struct header h = {.type = 'x', .name = "pax"};
    put_pax_time(&pax, "mtime", &s->st_mtim);
    put_pax_time(&pax, "ctime", &s->st_ctim);
    bool put = !(S_ISREG(s->st_mode) || S_ISDIR(s->st_mode)) || put_xattrs(&pax, file);
    set_number(h.mode, sizeof h.mode, 0644);
    set_number(h.size, sizeof h.size, pax.length);
    put = put && put_header(&h) && put_all(1, pax.data, pax.length) && pad(pax.length);
    bytes_free(&pax);
    return put;
}

/* Where a file with more than one name has been packed; NULL: nowhere yet, and here it is. */
static const char *packed_before(const struct stat *s, const char *path)
{
    static struct packed { struct packed *next; ino_t inode; char path[]; } *all;
    for (struct packed *p = all; p; p = p->next)
        if (p->inode == s->st_ino)
            return p->path;
    struct packed *p = allocate(sizeof *p + strlen(path) + 1);
    p->next = all;
    p->inode = s->st_ino;
    strcpy(p->path, path);
    all = p;
    return NULL;
}

static bool pack_content(int fd, uint64_t size)
{
    char *chunk = allocate(CHUNK);
    uint64_t left = size;
    while (left) {
        ssize_t n = read(fd, chunk, left < CHUNK ? left : CHUNK);
        if (n < 0)
            break;
        if (n == 0) { /* it has shrunk meanwhile: the header has promised the rest */
            n = left < CHUNK ? (ssize_t)left : CHUNK;
            memset(chunk, 0, (size_t)n);
        }
        if (!put_all(1, chunk, (size_t)n))
            break;
        left -= (uint64_t)n;
    }
    free(chunk);
    return left == 0 && pad(size);
}

static bool pack_entry(int parent, const char *name, const char *path);

static bool pack_directory(int parent, const char *name, const char *path)
{
    const char *slash = path[strlen(path) - 1] == '/' ? "" : "/";
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *entries = fd < 0 ? NULL : fdopendir(fd);
    bool done = entries != NULL;
    char opaque, *deeper;
    if (done && as_layer && fgetxattr(fd, "trusted.overlay.opaque", &opaque, 1) == 1) {
        done = asprintf(&deeper, "%s%s", path, slash) >= 0 && put_mark(deeper, ".wh..opq");
        free(deeper);
    }
    for (struct dirent *entry; done && (entry = readdir(entries));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        done = asprintf(&deeper, "%s%s%s", path, slash, entry->d_name) >= 0 &&
               pack_entry(dirfd(entries), entry->d_name, deeper);
        free(deeper);
    }
    if (entries)
        closedir(entries);
    return done;
}

static char type_of(mode_t mode)
{
    return S_ISREG(mode) ? '0' : S_ISDIR(mode) ? '5' : S_ISLNK(mode) ? '2' : S_ISFIFO(mode) ? '6'
                                                                       : S_ISCHR(mode) ? '3' : '4';
}

static bool pack_entry(int parent, const char *name, const char *path)
{
    struct header h = {0};
    struct stat s;
    static char target[4096]; /* read before it is written again: a stack would not be deep enough */
    memset(target, 0, sizeof target);
    if (strlen(path) >= sizeof target) {
        errno = ENAMETOOLONG; /* deeper than names go, and so than we do */
        return false;
    }
    if (fstatat(parent, name, &s, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT;
    if (S_ISSOCK(s.st_mode))
        return true; /* tar has no sockets */
    char file[300]; /* "." or the name of an entry of a directory */
    snprintf(file, sizeof file, "/proc/self/fd/%d/%s", parent, name);
    if (as_layer && !strncmp(name, ".wh.", 4)) {
        errno = EILSEQ; /* it would be read as a mark */
        return false;
    }
    if (as_layer && !put_extended(file, &s))
        return false;
    if (as_layer && S_ISCHR(s.st_mode) && s.st_rdev == 0)
        return put_mark(path, name);
    h.type = type_of(s.st_mode);
    if (h.type == '2' && readlinkat(parent, name, target, sizeof target - 1) < 0)
        return false;
    const char *other = as_layer && h.type == '0' && s.st_nlink > 1 ? packed_before(&s, path) : NULL;
    if (other) {
        h.type = '1';
        strcpy(target, other);
    }
    if ((strlen(path) > 99 && !put_long('L', path)) || (strlen(target) > 99 && !put_long('K', target)))
        return false;
    strncpy(h.name, path, 99);
    strncpy(h.link, target, 99);
    set_number(h.mode, sizeof h.mode, s.st_mode & 07777);
    set_number(h.uid, sizeof h.uid, s.st_uid);
    set_number(h.gid, sizeof h.gid, s.st_gid);
    set_number(h.size, sizeof h.size, h.type == '0' ? (uint64_t)s.st_size : 0);
    set_number(h.mtime, sizeof h.mtime, s.st_mtime > 0 ? (uint64_t)s.st_mtime : 0);
    if (h.type == '3' || h.type == '4') {
        set_number(h.major, sizeof h.major, major(s.st_rdev));
        set_number(h.minor, sizeof h.minor, minor(s.st_rdev));
    }
    int fd = h.type == '0' ? openat(parent, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW) : -1;
    if (h.type == '0' && fd < 0)
        return false;
    bool done = put_header(&h) && (fd < 0 || pack_content(fd, (uint64_t)s.st_size));
    if (fd >= 0)
        close(fd);
    return done && (h.type != '5' || pack_directory(parent, name, path));
}

int pack(const char *path)
{
    static const char end[2 * BLOCK];
    struct stat s;
    char *real = realpath(path, NULL);
    if (!real || lstat(real, &s))
        return applet_failed(path);
    const char *name = strrchr(real, '/') + 1;
    bool done = S_ISDIR(s.st_mode) ? pack_entry(AT_FDCWD, real, "./") : pack_entry(AT_FDCWD, real, name);
    return done && put_all(1, end, sizeof end) ? 0 : applet_failed(path);
}

int pack_layer(int upper)
{
    static const char end[2 * BLOCK];
    as_layer = true;
    return pack_entry(upper, ".", "./") && put_all(1, end, sizeof end) ? 0 : applet_failed("changes");
}
