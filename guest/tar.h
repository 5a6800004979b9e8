/* What tar streams are made of. */
#ifndef HADAL_TAR_H
#define HADAL_TAR_H

#define BLOCK 512
#define CHUNK (128 * 1024)

struct header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100];
    char magic[8], user[32], group[32], major[8], minor[8], prefix[155], padding[12];
};

#endif
