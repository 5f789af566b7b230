#define ATTEND attend_native
#include "attend.inc"
