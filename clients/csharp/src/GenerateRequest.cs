using System;
using System.Collections.Generic;

namespace Safelight
{
    /// <summary>The steps that have guidance, as shares of all steps: from 0.2 to 0.8.</summary>
    public struct GuidanceInterval
    {
        public GuidanceInterval(double start, double end)
        {
            Start = start;
            End = end;
        }

        public double Start { get; }
        public double End { get; }
    }

    /// <summary>How far the server may lower the quality under load. Each property allows one kind of loss.</summary>
    public sealed class QualityFloor
    {
        /// <summary>Denoising steps to use under load; null: the number of steps is not lowered.</summary>
        public int? MinNumSteps { get; set; }

        /// <summary>Whether previews may be made by a cheaper method than the requested one.</summary>
        public bool CheaperPreviews { get; set; }

        /// <summary>Minimum similarity, above 0 and at most 1, of a finished picture that may be served instead of a new
        /// one; null: no such picture is served.</summary>
        public double? MinSimilarity { get; set; }
    }

    /// <summary>
    /// What to generate. A null property means the default of the model or server. Previews and picture are raw RGBA8, so
    /// that they can be copied into a texture, unless <see cref="PictureMediaType"/> or JSON says otherwise.
    /// </summary>
    public sealed class GenerateRequest
    {
        private readonly string prompt;
        private readonly string json;

        public GenerateRequest(string prompt) : this(prompt, null)
        {
            if (prompt == null) throw new ArgumentNullException(nameof(prompt));
        }

        private GenerateRequest(string prompt, string json)
        {
            this.prompt = prompt;
            this.json = json;
        }

        /// <summary>A GenerateRequest message as JSON. Only properties that are set are added to it.</summary>
        public static GenerateRequest FromJson(string json) =>
            new GenerateRequest(null, json ?? throw new ArgumentNullException(nameof(json)));

        /// <summary>The model, "models/NAME".</summary>
        public string Model { get; set; }

        public string NegativePrompt { get; set; }

        /// <summary>Width of the pictures. Set it together with <see cref="HeightPx"/>.</summary>
        public int? WidthPx { get; set; }

        public int? HeightPx { get; set; }
        public int? NumInferenceSteps { get; set; }
        public double? GuidanceScale { get; set; }

        /// <summary>How much of the contrast that guidance adds is taken back, from 0 to 1.</summary>
        public double? GuidanceRescale { get; set; }

        /// <summary>Where guidance begins and ends, as shares of the steps. Steps outside cost half.</summary>
        public GuidanceInterval? GuidanceInterval { get; set; }

        /// <summary>How far the server may lower the quality under load; null: not at all.</summary>
        public QualityFloor QualityFloor { get; set; }

        /// <summary>A picture to start from: the name that <see cref="Client.UploadImage"/> returned, or
        /// "generations/ID/outputs/INDEX", the picture of another generation.</summary>
        public string InitImage { get; set; }

        /// <summary>How far the picture may depart from <see cref="InitImage"/>, above 0 and at most 1.</summary>
        public double? Strength { get; set; }

        /// <summary>The mask, named as <see cref="InitImage"/>: white (or, with an alpha channel, transparent) parts are
        /// developed anew.</summary>
        public string Mask { get; set; }

        /// <summary>A picture for each seed. Empty: one picture, with a seed that the server chooses.</summary>
        public IList<ulong> Seeds { get; } = new List<ulong>();

        /// <summary>The longest edge of previews in pixels; larger previews are scaled down.</summary>
        public int? PreviewMaxEdgePx { get; set; }

        /// <summary>Sends a preview after every n-th step.</summary>
        public int? PreviewEveryNSteps { get; set; }

        /// <summary>The encoding of the picture, such as "image/png".</summary>
        public string PictureMediaType { get; set; }

        internal RequestHandle ToNative()
        {
            if (WidthPx.HasValue != HeightPx.HasValue) throw new ArgumentException("WidthPx and HeightPx go together");
            RequestHandle request;
            if (json != null)
            {
                request = Native.safelight_request_from_json(Native.Utf8(json), out ErrorHandle error);
                if (request.IsInvalid) throw SafelightException.Take(error);
            }
            else
            {
                request = Native.safelight_request_new(Native.Utf8(prompt));
            }
            if (Model != null) Native.safelight_request_set_model(request, Native.Utf8(Model));
            if (NegativePrompt != null) Native.safelight_request_set_negative_prompt(request, Native.Utf8(NegativePrompt));
            if (WidthPx is int width && HeightPx is int height) Native.safelight_request_set_size(request, width, height);
            if (NumInferenceSteps is int steps) Native.safelight_request_set_num_inference_steps(request, steps);
            if (GuidanceScale is double scale) Native.safelight_request_set_guidance_scale(request, scale);
            if (GuidanceInterval is GuidanceInterval interval)
            {
                Native.safelight_request_set_guidance_interval(request, interval.Start, interval.End);
            }
            if (GuidanceRescale is double rescale) Native.safelight_request_set_guidance_rescale(request, rescale);
            if (QualityFloor is QualityFloor floor)
            {
                Native.safelight_request_set_quality_floor(
                    request, floor.MinNumSteps ?? 0, floor.CheaperPreviews ? 1 : 0, floor.MinSimilarity ?? 0);
            }
            if (InitImage != null) Native.safelight_request_set_init_image(request, Native.Utf8(InitImage));
            if (Strength is double strength) Native.safelight_request_set_strength(request, strength);
            if (Mask != null) Native.safelight_request_set_mask(request, Native.Utf8(Mask));
            foreach (ulong seed in Seeds) Native.safelight_request_add_output(request, seed);
            if (PreviewMaxEdgePx is int edge) Native.safelight_request_set_preview_max_edge(request, edge);
            if (PreviewEveryNSteps is int n) Native.safelight_request_set_preview_every_n_steps(request, n);
            if (PictureMediaType != null) Native.safelight_request_set_picture_media_type(request, Native.Utf8(PictureMediaType));
            return request;
        }
    }
}
