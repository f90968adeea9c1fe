#ifndef SAFELIGHTSRC_H
#define SAFELIGHTSRC_H

#include <gst/base/gstpushsrc.h>

G_BEGIN_DECLS

#define SAFELIGHT_TYPE_SRC (safelight_src_get_type())
G_DECLARE_FINAL_TYPE(SafelightSrc, safelight_src, SAFELIGHT, SRC, GstPushSrc)

G_END_DECLS

#endif
