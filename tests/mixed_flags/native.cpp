#define ATTEND attend_native
#define GROUP group_native
#define NAME name_native
#include "attend.inc"
