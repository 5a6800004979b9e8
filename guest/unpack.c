/* Trees out of tar streams: into a box, and out of image layers. Read: ustar, GNU, pax (path, linkpath, size,
 * mtime, uid, gid, SCHILY.xattr). No entry leads outside the directory that is unpacked into: every lookup
 * stays beneath it (openat2). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "guest.h"
#include "tar.h"

/* What the headers before an entry, and its own, say about it. */
struct entry {
    char type;
    char *path, *link;
    bool has_size;
    uint64_t size, mode, uid, gid, major, minor;
    struct timespec modified;
    bool has_modified, has_uid, has_gid;
    struct bytes xattrs; /* fields: TEXT name, LENGTH value, in turns */
};

struct unpacking {
    int base;
    bool layer, owner;
    char *parent_path;
    int parent;
    struct bytes directories; /* path, zero byte, mode, time: set when all is in place */
    char *chunk;
};

static bool read_all(void *data, size_t length)
{
    for (char *at = data; length;) {
        ssize_t n = read(0, at, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            errno = n ? errno : EPIPE; /* the stream is cut off */
            return false;
        }
        at += n;
        length -= (size_t)n;
    }
    return true;
}

static uint64_t get_number(const char *field, size_t width)
{
    uint64_t number = 0;
    if ((unsigned char)field[0] & 0x80) {
        for (size_t i = 1; i < width; i++)
            number = number << 8 | (unsigned char)field[i];
        return number;
    }
    for (size_t i = 0; i < width && field[i]; i++)
        if (field[i] >= '0' && field[i] <= '7')
            number = number * 8 + (uint64_t)(field[i] - '0');
    return number;
}

static char *get_content(uint64_t size)
{
    if (size > 1 << 20) {
        errno = EFBIG; /* of names and attributes */
        return NULL;
    }
    uint64_t padded = (size + BLOCK - 1) / BLOCK * BLOCK;
    char *text = allocate(padded + 1);
    if (!read_all(text, padded))
        return NULL;
    text[size] = 0;
    return text;
}

static void take_pax(struct entry *e, const char *key, const char *value, size_t length)
{
    char *end;
    if (!strcmp(key, "path")) {
        free(e->path);
        e->path = strndup(value, length);
    } else if (!strcmp(key, "linkpath")) {
        free(e->link);
        e->link = strndup(value, length);
    } else if (!strcmp(key, "size")) {
        e->size = strtoull(value, NULL, 10);
        e->has_size = true;
    } else if (!strcmp(key, "uid")) {
        e->uid = strtoull(value, NULL, 10);
        e->has_uid = true;
    } else if (!strcmp(key, "gid")) {
        e->gid = strtoull(value, NULL, 10);
        e->has_gid = true;
    } else if (!strcmp(key, "mtime")) {
        e->modified.tv_sec = strtoll(value, &end, 10);
        long digit = 100000000;
        if (*end == '.')
            for (end++; *end >= '0' && *end <= '9'; end++, digit /= 10)
                e->modified.tv_nsec += (*end - '0') * digit;
        e->has_modified = true;
    } else if (!strncmp(key, "SCHILY.xattr.trusted.overlay.", 29)) {
        ; /* they would tell overlayfs to look elsewhere; what layers may say, they say by whiteouts */
    } else if (!strncmp(key, "SCHILY.xattr.", 13)) {
        put_text(&e->xattrs, T_TEXT, key + 13);
        put_field(&e->xattrs, T_LENGTH, value, length);
    } else if (!strncmp(key, "GNU.sparse.", 11)) {
        e->type = 'S';
    }
}

/* Records of "length key=value\n". */
static bool read_pax(struct entry *e, char *text, uint64_t size)
{
    for (char *at = text, *end = text + size; at < end;) {
        char *key;
        unsigned long long length = strtoull(at, &key, 10);
        if (length < 5 || length > (uint64_t)(end - at) || *key != ' ' || at[length - 1] != '\n')
            return false;
        key++;
        char *value = memchr(key, '=', (size_t)(at + length - key));
        if (!value)
            return false;
        *value++ = 0;
        at[length - 1] = 0;
        take_pax(e, key, value, (size_t)(at + length - 1 - value));
        at += length;
    }
    return true;
}

/* The next entry: 1, or 0 at the end, or -1. */
static int next_entry(struct entry *e)
{
    struct header h;
    static const struct header zero;
    for (;;) {
        ssize_t first = read(0, &h, 1);
        if (first == 0)
            return 0;
        if (first < 0 || !read_all((char *)&h + 1, sizeof h - 1))
            return -1;
        if (!memcmp(&h, &zero, sizeof h))
            return 0;
        unsigned sum = 8 * ' ', stored = (unsigned)get_number(h.checksum, sizeof h.checksum);
        for (size_t i = 0; i < sizeof h; i++)
            sum += i >= 148 && i < 156 ? 0 : ((unsigned char *)&h)[i];
        errno = EILSEQ;
        if (sum != stored)
            return -1;
        uint64_t size = get_number(h.size, sizeof h.size);
        if (!strchr("xgLK", h.type) || !h.type) {
            if (!e->has_size)
                e->size = size;
            break;
        }
        char *text = get_content(size);
        if (!text)
            return -1;
        bool understood = h.type != 'x' || read_pax(e, text, size);
        if (h.type == 'L' || h.type == 'K') {
            char **name = h.type == 'L' ? &e->path : &e->link;
            free(*name);
            *name = strdup(text);
        }
        free(text);
        errno = EILSEQ;
        if (!understood)
            return -1;
    }
    char name[257];
    bool prefixed = !memcmp(h.magic, "ustar\0", 6) && h.prefix[0];
    snprintf(name, sizeof name, "%.155s%s%.100s", prefixed ? h.prefix : "", prefixed ? "/" : "", h.name);
    e->path = e->path ? e->path : strdup(name);
    e->link = e->link ? e->link : strndup(h.link, sizeof h.link);
    e->type = e->type ? e->type : h.type ? h.type : '0';
    e->mode = get_number(h.mode, sizeof h.mode);
    e->uid = e->has_uid ? e->uid : get_number(h.uid, sizeof h.uid);
    e->gid = e->has_gid ? e->gid : get_number(h.gid, sizeof h.gid);
    e->major = get_number(h.major, sizeof h.major);
    e->minor = get_number(h.minor, sizeof h.minor);
    if (!e->has_modified)
        e->modified.tv_sec = (time_t)get_number(h.mtime, sizeof h.mtime);
    return 1;
}

static void free_entry(struct entry *e)
{
    free(e->path);
    free(e->link);
    bytes_free(&e->xattrs);
    *e = (struct entry){0};
}

static int open_beneath(struct unpacking *u, const char *path)
{
    struct open_how how = {.flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC,
                           .resolve = u->layer ? RESOLVE_IN_ROOT : RESOLVE_BENEATH};
    return (int)syscall(SYS_openat2, u->base, *path ? path : ".", &how, sizeof how);
}

static int open_parent(struct unpacking *u, const char *path)
{
    if (u->parent_path && !strcmp(u->parent_path, path))
        return u->parent;
    int fd = open_beneath(u, path);
    if (fd < 0 && errno == ENOENT) {
        char *above = strdup(path), *slash = strrchr(above, '/');
        const char *name = slash ? slash + 1 : above;
        if (slash)
            *slash = 0;
        int parent = dup(open_parent(u, slash ? above : ""));
        if (parent >= 0 && (mkdirat(parent, name, 0755) == 0 || errno == EEXIST))
            fd = open_beneath(u, path);
        if (parent >= 0)
            close(parent);
        free(above);
    }
    if (fd < 0)
        return -1;
    if (u->parent_path)
        close(u->parent);
    free(u->parent_path);
    u->parent_path = strdup(path);
    u->parent = fd;
    return fd;
}

/* Without "./", doubled and final slashes; false where it goes up. */
static bool clean(char *path)
{
    char *out = path;
    for (char *at = path; *at;) {
        size_t length = strcspn(at, "/");
        bool up = length == 2 && !strncmp(at, "..", 2), same = length == 0 || (length == 1 && *at == '.');
        if (up)
            return false;
        if (!same) {
            if (out != path)
                *out++ = '/';
            memmove(out, at, length);
            out += length;
        }
        at += length + (at[length] == '/');
    }
    *out = 0;
    return true;
}

static bool unpack_content(struct unpacking *u, int fd, uint64_t size)
{
    for (uint64_t left = size; left;) {
        size_t part = left < CHUNK ? left : CHUNK;
        if (!read_all(u->chunk, part))
            return false;
        for (size_t done = 0; fd >= 0 && done < part;) {
            ssize_t n = write(fd, u->chunk + done, part - done);
            if (n < 0)
                return false;
            done += (size_t)n;
        }
        left -= part;
    }
    return size % BLOCK == 0 || read_all(u->chunk, BLOCK - size % BLOCK);
}

static bool set_xattrs(int fd, const struct entry *e)
{
    const uint8_t *at = e->xattrs.data, *end = at + e->xattrs.length;
    struct field name, value;
    bool broken = false, set = true;
    while (set && at && next_field(&at, end, &name, &broken) && next_field(&at, end, &value, &broken)) {
        char *key = field_text(&name);
        set = key && (fsetxattr(fd, key, value.value, value.length, 0) == 0 || errno == ENOTSUP);
        free(key);
    }
    return set;
}

static bool set_attributes(struct unpacking *u, const struct entry *e, int parent, const char *name)
{
    struct timespec times[2] = {e->modified, e->modified};
    if (u->owner && fchownat(parent, name, (uid_t)e->uid, (gid_t)e->gid, AT_SYMLINK_NOFOLLOW))
        return false;
    if (e->type != '2' && fchmodat(parent, name, (mode_t)(e->mode & 07777), 0))
        return false;
    if (u->layer && e->xattrs.length && (e->type == '0' || e->type == '5')) {
        int fd = openat(parent, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
        bool set = fd >= 0 && set_xattrs(fd, e);
        if (fd >= 0)
            close(fd);
        if (!set)
            return false;
    }
    return utimensat(parent, name, times, AT_SYMLINK_NOFOLLOW) == 0;
}

/* Image layers mark what a lower layer has and this one has not; overlayfs marks it otherwise. */
static int unpack_whiteout(int parent, const char *name, const struct timespec *modified)
{
    if (!strcmp(name, ".wh..wh..opq"))
        return fsetxattr(parent, "trusted.overlay.opaque", "y", 1, 0) ? -1 : 1;
    if (strncmp(name, ".wh.", 4))
        return 0;
    if (!name[4] || !strncmp(name + 4, ".wh.", 4) || !strcmp(name + 4, ".") || !strcmp(name + 4, ".."))
        return 1; /* other marks of aufs mean nothing to us */
    if (mknodat(parent, name + 4, S_IFCHR, makedev(0, 0)) && errno != EEXIST)
        return -1;
    struct timespec times[2] = {*modified, *modified};
    return utimensat(parent, name + 4, times, AT_SYMLINK_NOFOLLOW) ? -1 : 1;
}

static bool make_file(struct unpacking *u, const struct entry *e, int parent, const char *name)
{
    int fd = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    bool done = fd >= 0 && unpack_content(u, fd, e->size);
    return fd >= 0 && close(fd) == 0 && done;
}

static bool make_link(struct unpacking *u, const struct entry *e, int parent, const char *name)
{
    char *target = strdup(e->link), *slash;
    bool made = false;
    if (clean(target)) {
        slash = strrchr(target, '/');
        if (slash)
            *slash = 0;
        int from = open_beneath(u, slash ? target : "");
        made = from >= 0 && linkat(from, slash ? slash + 1 : target, parent, name, 0) == 0;
        if (from >= 0)
            close(from);
    }
    free(target);
    return made;
}

static bool make_directory(struct unpacking *u, const struct entry *e, int parent, const char *name)
{
    if (mkdirat(parent, name, 0700) && errno != EEXIST)
        return false;
    bytes_add(&u->directories, e->path, strlen(e->path) + 1);
    bytes_add(&u->directories, &e->modified, sizeof e->modified);
    return true;
}

static bool unpack_entry(struct unpacking *u, struct entry *e)
{
    if (!clean(e->path)) {
        errno = EXDEV;
        return false;
    }
    char *slash = strrchr(e->path, '/'), *name = slash ? slash + 1 : e->path;
    if (!*name) { /* the directory itself */
        e->type = '5';
        bytes_add(&u->directories, ".", 2);
        bytes_add(&u->directories, &e->modified, sizeof e->modified);
        return fchmod(u->base, (mode_t)(e->mode & 07777)) == 0 &&
               (!u->owner || fchown(u->base, (uid_t)e->uid, (gid_t)e->gid) == 0);
    }
    char *above = slash ? strndup(e->path, (size_t)(slash - e->path)) : strdup("");
    int parent = open_parent(u, above);
    free(above);
    if (parent < 0)
        return false;
    int whiteout = u->layer ? unpack_whiteout(parent, name, &e->modified) : 0;
    if (whiteout)
        return whiteout > 0 && unpack_content(u, -1, e->size);
    if (e->type != '5' && unlinkat(parent, name, 0) && errno != ENOENT)
        return false;
    mode_t kind = e->type == '3' ? S_IFCHR : e->type == '4' ? S_IFBLK : S_IFIFO;
    bool made;
    switch (e->type) {
    case '0': case '7': made = make_file(u, e, parent, name); break;
    case '1': return make_link(u, e, parent, name);
    case '2': made = symlinkat(e->link, parent, name) == 0; break;
    case '5': made = make_directory(u, e, parent, name); break;
    case '3': case '4':
        if (!u->layer)
            return true; /* a box has no devices of its own */
        /* fall through */
    case '6': made = mknodat(parent, name, kind | 0600, makedev((unsigned)e->major, (unsigned)e->minor)) == 0;
        break;
    default: errno = ENOTSUP; made = false;
    }
    return made && set_attributes(u, e, parent, name);
}

static void set_directory_times(struct unpacking *u)
{
    size_t at = u->directories.length;
    const char *data = (const char *)u->directories.data;
    for (at = 0; at < u->directories.length;) {
        const char *path = data + at;
        struct timespec times[2];
        at += strlen(path) + 1;
        memcpy(&times[0], data + at, sizeof times[0]);
        times[1] = times[0];
        at += sizeof times[0];
        int fd = open_beneath(u, path);
        if (fd >= 0) {
            futimens(fd, times);
            close(fd);
        }
    }
}

int unpack(const char *path, bool image_layer)
{
    struct unpacking u = {.layer = image_layer, .owner = geteuid() == 0, .chunk = allocate(CHUNK)};
    struct entry e = {0};
    u.base = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (u.base < 0)
        return applet_failed(path);
    umask(0);
    int more;
    while ((more = next_entry(&e)) > 0) {
        if (!unpack_entry(&u, &e))
            return applet_failed(e.path);
        free_entry(&e);
    }
    if (more < 0)
        return applet_failed("not a tar stream that can be read");
    set_directory_times(&u);
    for (ssize_t n; (n = read(0, u.chunk, CHUNK)) > 0;)
        ; /* padding after the end */
    return 0;
}
